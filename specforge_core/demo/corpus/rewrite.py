"""Rewriting: voice, tense and mood of sentences, grammar, tone, length, lists and order."""

from collections.abc import Callable
from random import Random
from typing import NamedTuple

from specforge_core.demo.corpus.problem import Accepts, Problem, capitalized, draw, listed, pick
from specforge_core.demo.corpus.words import (
    ADJECTIVES,
    FRUIT_AND_MORE,
    JOBS,
    MONTHS,
    NAMES,
    PLACES,
    THINGS,
    VERBS,
    WEEKDAYS,
)


class Sentence(NamedTuple):
    """The parts of a simple sentence about someone who does something to a thing."""

    subject: str
    verb: tuple[str, str, str, str]
    adjective: str
    thing: str
    plural: bool
    setting: str

    @property
    def object(self) -> str:
        return f"the {self.adjective} {self.thing}"

    @property
    def was(self) -> str:
        return "were" if self.plural else "was"


class Form(NamedTuple):
    """A form a sentence can take: what to call it, how to build it, and the rule in words."""

    name: str
    build: Callable[[Sentence], str]
    rule: Callable[[Sentence], str]


FORMS: tuple[Form, ...] = (
    Form("the past tense", lambda s: f"{s.subject} {s.verb[2]} {s.object}{s.setting}.",
         lambda s: f'the past form of "{s.verb[0]}" is "{s.verb[2]}"'),
    Form("the present tense", lambda s: f"{s.subject} {s.verb[1]} {s.object}{s.setting}.",
         lambda s: f'after one person the present form is "{s.verb[1]}"'),
    Form("the future tense", lambda s: f"{s.subject} will {s.verb[0]} {s.object}{s.setting}.",
         lambda s: f'the future takes "will" and the base form "{s.verb[0]}"'),
    Form("the present perfect", lambda s: f"{s.subject} has {s.verb[3]} {s.object}{s.setting}.",
         lambda s: f'the present perfect takes "has" and the participle "{s.verb[3]}"'),
    Form("the passive voice", lambda s: f"{s.object} {s.was} {s.verb[3]} by {s.subject}{s.setting}.",
         lambda s: f'in the passive "{s.object}" comes first, the verb becomes "{s.was} {s.verb[3]}", '
                   f'and "by" names who did it'),
    Form("a question about the past", lambda s: f"did {s.subject} {s.verb[0]} {s.object}{s.setting}?",
         lambda s: f'a question about the past starts with "did" and takes the base form "{s.verb[0]}"'),
    Form("a negative past sentence", lambda s: f"{s.subject} did not {s.verb[0]} {s.object}{s.setting}.",
         lambda s: f'the negative takes "did not" and the base form "{s.verb[0]}"'),
    Form("a polite request", lambda s: f"could {s.subject} please {s.verb[0]} {s.object}{s.setting}?",
         lambda s: f'a polite request starts with "could" and has "please" before "{s.verb[0]}"'),
    Form("a statement of duty", lambda s: f"{s.subject} must {s.verb[0]} {s.object}{s.setting}.",
         lambda s: f'a duty takes "must" and the base form "{s.verb[0]}"'),
)  # fmt: skip


def random_sentence(rng: Random) -> Sentence:
    """A sentence with random words; a setting of place and time is there most of the time."""
    subject = rng.choice(NAMES) if rng.random() < 0.5 else f"the {rng.choice(JOBS)}"
    plural = rng.random() < 0.35
    place = f" {rng.choice(('in', 'near', 'behind'))} the {rng.choice(PLACES)}" if rng.random() < 0.5 else ""
    time = rng.choice((f" on {rng.choice(WEEKDAYS)}", f" in {rng.choice(MONTHS)}")) if rng.random() < 0.5 else ""
    return Sentence(
        subject, rng.choice(VERBS), rng.choice(ADJECTIVES), rng.choice(THINGS)[plural], plural, place + time
    )


def sentence_key(sentence: Sentence) -> str:
    """The key of a sentence: its words, whatever form it takes."""
    return f"rewrite|{sentence.subject}|{sentence.verb[0]}|{sentence.adjective}|{sentence.thing}|{sentence.setting}"


def asked(rng: Random, task: str, text: str) -> str:
    """The task and the text as one prompt."""
    return rng.choice(
        (f"{task}: {text}", f'{task}: "{text}"', f"{task}.\n\n{text}", f"{text}\n\n{task}.", f"{task}, please.\n{text}")
    )


def as_result(rng: Random, result: str) -> str:
    return rng.choice((f"Result: {result}", result, f"Here it is: {result}", f"So it becomes: {result}"))


def form_task(rng: Random, form: Form) -> str:
    return rng.choice((f"Rewrite this in {form.name}" if form.name.startswith("the") else f"Turn this into {form.name}",
                       f"Change the sentence to {form.name}", f"Put this into {form.name}"))  # fmt: skip


def form_answer(rng: Random, sentence: Sentence, form: Form) -> str:
    """The sentence in the wanted form, after the rule that leads to it."""
    result = capitalized(form.build(sentence))
    who = rng.choice((f'Here "{sentence.subject}" does the action and "{sentence.object}" receives it. ',
                      f'The verb of the sentence is "{sentence.verb[0]}". ', ""))  # fmt: skip
    return f"{who}{capitalized(form.rule(sentence))}.\n{as_result(rng, result)}"


def _form(rng: Random, accepts: Accepts) -> Problem:
    sentence = draw(lambda: random_sentence(rng), sentence_key, accepts)
    source, target = rng.sample(FORMS, 2)
    question = asked(rng, form_task(rng, target), capitalized(source.build(sentence)))
    return Problem(
        sentence_key(sentence), question, form_answer(rng, sentence, target), capitalized(target.build(sentence))
    )


def _combine(rng: Random, accepts: Accepts) -> Problem:
    def two() -> tuple[Sentence, Sentence]:
        first = random_sentence(rng)
        return first._replace(setting=""), random_sentence(rng)._replace(subject=first.subject)

    def key(pair: tuple[Sentence, Sentence]) -> str:
        return f"{sentence_key(pair[0])}|{sentence_key(pair[1])}"

    pair = draw(two, key, accepts)
    one, other = pair
    past = FORMS[0]
    link = rng.choice(("and", "and then", "but first", "after which"))
    tail = f"{one.subject} {other.verb[2]}" if link == "after which" else other.verb[2]
    result = capitalized(f"{past.build(one)[:-1]} {link} {tail} {other.object}{other.setting}.")
    text = f"{capitalized(past.build(one))} {capitalized(past.build(other))}"
    work = (
        f'Both sentences are about "{one.subject}", so the link "{link}" can join "{one.verb[2]}" and '
        f'"{other.verb[2]}".'
    )
    task = rng.choice(
        (f'Join the sentences with "{link}"', f'Make one sentence with "{link}"', f'Combine these using "{link}"')
    )
    return Problem(key(pair), asked(rng, task, text), f"{work}\n{as_result(rng, result)}", result)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _fix(rng: Random, accepts: Accepts) -> Problem:
    """Two or three planted mistakes, each named in the answer."""
    sentence = draw(
        lambda: random_sentence(rng)._replace(plural=False, thing=rng.choice(THINGS)[0]), sentence_key, accepts
    )
    article = _article(sentence.adjective)
    right = [
        *sentence.subject.split(),
        "has",
        sentence.verb[3],
        article,
        sentence.adjective,
        *f"{sentence.thing}{sentence.setting}.".split(),
    ]
    right[0] = capitalized(right[0])
    wrong, notes, result = list(right), [], " ".join(right)
    num_subject = len(sentence.subject.split())
    planted = set(rng.sample(("capital", "agreement", "article", "double", "stop"), rng.randint(2, 3)))
    if "capital" in planted:
        wrong[0] = wrong[0].lower()
        notes.append(f'the sentence starts with a capital letter: "{right[0]}"')
    if "agreement" in planted:
        wrong[num_subject] = "have"
        notes.append(f'"{sentence.subject}" is one person, so "have" becomes "has"')
    if "article" in planted:
        wrong[num_subject + 2] = "a" if article == "an" else "an"
        sound = "a vowel" if article == "an" else "a consonant"
        notes.append(f'"{sentence.adjective}" starts with {sound}, so it takes "{article}"')
    if "double" in planted:
        wrong[num_subject + 1] += " " + sentence.verb[3]
        notes.append(f'"{sentence.verb[3]}" stands there twice')
    text = " ".join(wrong)
    if "stop" in planted:
        text = text.rstrip(".")
        notes.append("the full stop at the end is missing")
    task = rng.choice(
        ("Fix the grammar", "Correct the mistakes", "Find and fix the errors in this sentence", "Proofread this")
    )
    work = "\n".join(f"{i}. {capitalized(note)}." for i, note in enumerate(notes, 1))
    return Problem(sentence_key(sentence), asked(rng, task, text), f"{work}\n{as_result(rng, result)}", result)


FILLERS = (
    "As a matter of fact, I would like to let you know that {core}",
    "I just wanted to say, at this point in time, that {core}",
    "It is perhaps worth mentioning in this context that {core}",
    "To be perfectly honest with you, it seems that {core}",
    "Please be aware, if you have not heard already, that {core}",
    "For what it is worth, and as you may know, {core}",
    "Basically, what I am trying to tell all of you is that {core}",
    "At the end of the day, we should not forget that {core}",
)


def _shorten(rng: Random, accepts: Accepts) -> Problem:
    sentence = draw(lambda: random_sentence(rng), sentence_key, accepts)
    core = rng.choice(FORMS[:5]).build(sentence)
    filler = rng.choice(FILLERS)
    result = capitalized(core)
    task = rng.choice(
        ("Make this shorter", "Shorten the sentence", "Cut the filler", "Say this in fewer words", "Tighten this")
    )
    words = filler.split(" {core}")[0]
    work = rng.choice((f'The words "{words}" add nothing.', f'Only the part after "{words.split()[-1]}" matters.',
                       "The first part is filler and can go."))  # fmt: skip
    return Problem(
        sentence_key(sentence), asked(rng, task, filler.format(core=core)), f"{work}\n{as_result(rng, result)}", result
    )


# (casual, formal) ways to say the same; the slots are filled with the same words in both
TONES = (
    ("can you send me the {thing} by {day}?", "Could you please send me the {thing} by {day}?"),
    ("sorry, I can't come on {day}.", "Unfortunately, I am unable to attend on {day}."),
    ("the {thing} is broken again!", "I regret to inform you that the {thing} is broken again."),
    ("wanna meet at the {place} on {day}?", "Would you be available to meet at the {place} on {day}?"),
    ("thanks a lot for the {adjective} {thing}!", "Thank you very much for the {adjective} {thing}."),
    ("I need a new {thing} asap.", "I require a new {thing} as soon as possible."),
    ("don't forget the {thing} on {day}!", "Please remember to bring the {thing} on {day}."),
    ("where's the {place}?", "Could you tell me where the {place} is located?"),
    ("I'm gonna be late on {day}.", "I would like to inform you that I will arrive late on {day}."),
    ("how much is the {adjective} {thing}?", "Could you let me know the price of the {adjective} {thing}?"),
    ("we got the {thing}, all good.", "We have received the {thing} in good order."),
    ("who's got the key to the {place}?", "Could you tell me who holds the key to the {place}?"),
)
OPENINGS = (("Hey {name},", "Dear {name},"), ("Hi {name}!", "Dear {name},"), ("Yo {name},", "Good morning {name},"))
CLOSINGS = (
    ("Cheers, {sender}", "Kind regards, {sender}"),
    ("See you, {sender}", "Yours sincerely, {sender}"),
    ("Bye! {sender}", "Best regards, {sender}"),
)


def _tone(rng: Random, accepts: Accepts) -> Problem:
    """A short message whose parts are rewritten one by one, from casual to formal or back."""

    def parts() -> tuple[tuple[int, ...], dict[str, str]]:
        name, sender = rng.sample(NAMES, 2)
        words = {"name": name, "sender": sender, "thing": rng.choice(THINGS)[0], "place": rng.choice(PLACES)}
        words |= {"day": rng.choice(WEEKDAYS), "adjective": rng.choice(ADJECTIVES)}
        body = rng.sample(range(len(TONES)), rng.randint(1, 2))
        return (rng.randrange(len(OPENINGS)), *body, rng.randrange(len(CLOSINGS))), words

    def key(drawn: tuple[tuple[int, ...], dict[str, str]]) -> str:
        return f"rewrite|tone|{drawn[0][1:-1]}|{sorted(drawn[1].items())}"

    drawn = draw(parts, key, accepts)
    (opening, *body, closing), words = drawn
    pairs = [OPENINGS[opening], *(TONES[i] for i in body), CLOSINGS[closing]]
    casual, formal = ([pair[side].format(**words) for pair in pairs] for side in (0, 1))
    to_formal = rng.random() < 0.7
    source, target = (casual, formal) if to_formal else (formal, casual)
    task = (
        pick(
            rng,
            "Make this message formal",
            "Rewrite this politely for the office",
            "Use a formal tone",
            "Turn this into a formal note",
        )
        if to_formal
        else rng.choice(("Make this message casual", "Rewrite this for a friend", "Use a relaxed tone"))
    )
    lead = rng.choice(("Here is the new version:", "Rewritten:", "This fits better:"))
    return Problem(key(drawn), asked(rng, task, " ".join(source)), "\n".join((lead, "", *target)), target[-1])


def _bullets(rng: Random, accepts: Accepts) -> Problem:
    def facts() -> tuple[str, str, tuple[str, ...]]:
        return rng.choice(NAMES), rng.choice(PLACES), tuple(rng.sample(FRUIT_AND_MORE, rng.randint(3, 6)))

    def key(drawn: tuple[str, str, tuple[str, ...]]) -> str:
        return f"rewrite|list|{drawn}"

    drawn = draw(facts, key, accepts)
    name, place, items = drawn
    verb = rng.choice(("needs", "buys", "wants", "sells", "stores", "orders"))
    sentence = f"{name} {verb} {listed(items)} for the {place}."
    bullets = "\n".join(f"- {item}" for item in items)
    count = f"That makes {len(items)} points."
    if rng.random() < 0.65:
        task = rng.choice(("Turn this into a bullet list", "Write this as bullet points", "Make a list out of this"))
        lead = f"What {name} {verb} for the {place}:"
        return Problem(key(drawn), asked(rng, task, sentence), f"{lead}\n{bullets}\n{count}", str(len(items)))
    task = pick(
        rng,
        f'Write one sentence from this list. Start with "{name} {verb}"',
        f'Turn the list into a sentence with "{name} {verb}"',
    )
    text = f"For the {place}:\n{bullets}"
    return Problem(
        key(drawn),
        f"{task}.\n\n{text}",
        f'The list has {len(items)} points, joined by commas and "and".\n{sentence}',
        sentence,
    )


def _alphabet(rng: Random, accepts: Accepts) -> Problem:
    def key(words: tuple[str, ...]) -> str:
        return f"rewrite|order|{words}"

    words = draw(lambda: tuple(rng.sample(FRUIT_AND_MORE, rng.randint(3, 6))), key, accepts)
    ordered = sorted(words)
    initials = list(dict.fromkeys(word[0] for word in ordered))
    work = [f"with {letter}: {listed([word for word in ordered if word[0] == letter])}" for letter in initials]
    task = rng.choice(
        ("Put these words in alphabetical order", "Sort these words from A to Z", "Order the words alphabetically")
    )
    answer = f"By first letter, {'; '.join(work)}.\n{as_result(rng, listed(ordered))}"
    return Problem(key(words), f"{task}: {', '.join(words)}", answer, listed(ordered))


# The sentence forms come up more often because they have the most to say.
TASKS = (_form, _form, _form, _combine, _fix, _shorten, _tone, _bullets, _alphabet)


def sample(rng: Random, accepts: Accepts) -> Problem:
    """A rewriting task of a random kind."""
    return rng.choice(TASKS)(rng, accepts)

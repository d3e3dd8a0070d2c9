"""Second and third turns: another number, one step explained, the result alone, another form, another question."""

from collections.abc import Callable
from random import Random
from typing import NamedTuple

from specforge_core.demo.corpus import arithmetic, functions, rewrite, table
from specforge_core.demo.corpus.problem import Accepts, capitalized, draw, pick
from specforge_core.demo.corpus.steps import written_out
from specforge_core.demo.corpus.words import NAMES


class Turn(NamedTuple):
    """A question of the user, the reply to it, and what can be checked in the reply."""

    question: str
    answer: str
    final_answer: str | None


class Dialogue(NamedTuple):
    """Several turns and the keys of all problems in them."""

    keys: tuple[str, ...]
    turns: tuple[Turn, ...]


# Sharing is left out: with another first amount the shares would no longer be whole.
CHANGEABLE = tuple(kind for kind in arithmetic.KINDS if kind != "sharing")
# How often to look for a variant in the wanted split before starting over with another problem.
VARIANT_TRIES = 40


def _changed_number(rng: Random, accepts: Accepts) -> Dialogue:
    """The same story with another first number, and all the others as they were."""
    kind_name = rng.choice(CHANGEABLE)
    kind = arithmetic.KINDS[kind_name]
    seed = rng.getrandbits(32)

    def key(numbers: arithmetic.Numbers) -> str:
        return arithmetic.key_of(kind_name, numbers)

    def story(numbers: arithmetic.Numbers) -> arithmetic.Story:
        # The same seed picks the same names and goods again.
        return kind.tell(Random(seed), numbers)

    first = draw(lambda: kind.numbers(rng), key, accepts)
    variants = (kind.numbers(rng)[:1] + first[1:] for _ in range(VARIANT_TRIES))
    second = next((v for v in variants if v != first and accepts(key(v)) and _works_out(story(v))), None)
    if second is None:
        return _changed_number(rng, accepts)
    before, after = story(first), story(second)
    ask = pick(
        rng,
        f"And if {after.changed}?",
        f"What if {after.changed} instead?",
        f"Now do the same if {after.changed}.",
        f"How does the result change if {after.changed}?",
    )
    wish, answer = written_out(rng, before.steps, before.conclusion)
    _, again = written_out(rng, after.steps, after.conclusion)
    turns = (Turn(before.question + wish, answer, str(before.result)), Turn(ask, again, str(after.result)))
    return Dialogue((key(first), key(second)), turns)


def _works_out(story: arithmetic.Story) -> bool:
    """Whether no intermediate result of a changed story falls below one."""
    return all(int(step.sum.rsplit(" ", 1)[1]) > 0 for step in story.steps)


def _explained_step(rng: Random, accepts: Accepts) -> Dialogue:
    """A question about one step of the answer before."""
    kind_name = rng.choice(tuple(arithmetic.KINDS))
    kind = arithmetic.KINDS[kind_name]
    numbers = draw(lambda: kind.numbers(rng), lambda drawn: arithmetic.key_of(kind_name, drawn), accepts)
    story = kind.tell(rng, numbers)
    wish, answer = written_out(rng, story.steps, story.conclusion)
    i = rng.randrange(len(story.steps))
    step = story.steps[i]
    value = step.sum.rsplit(" ", 1)[1]
    ordinal = ("first", "second", "third", "fourth")[i]
    ask = rng.choice(
        (f"Explain step {i + 1}.", f"Why do you do the {ordinal} step?", f"I do not understand the {ordinal} step.")
    )
    operation = {"×": "multiply", "+": "add", "-": "subtract", "÷": "divide"}[step.sum.split(" ")[1]]
    reason = rng.choice((f"The aim of the {ordinal} step is to {step.aim}.", f"In the {ordinal} step we {step.aim}."))
    use = (
        "That is already the result we were asked for"
        if i == len(story.steps) - 1
        else f"The next step, to {story.steps[i + 1].aim}, needs it"
    )
    reply = f"{reason} For that we {operation}: {step.sum}. {use}. The value of the step is {value}."
    return Dialogue(
        (arithmetic.key_of(kind_name, numbers),),
        (Turn(story.question + wish, answer, str(story.result)), Turn(ask, reply, value)),
    )


def _result_only(rng: Random, accepts: Accepts) -> Dialogue:
    """The answer before, cut down to its result."""
    problem = arithmetic.sample(rng, accepts)
    ask = pick(
        rng,
        "Make it shorter.",
        "Just the result, please.",
        "Can you say that in one short sentence?",
        "Too long. Only the number.",
    )
    reply = rng.choice(
        ("In short: the result is {}.", "The result is {}.", "Without the steps, it comes to {}.")
    ).format(problem.final_answer)
    return Dialogue(
        (problem.key,),
        (Turn(problem.question, problem.answer, problem.final_answer), Turn(ask, reply, problem.final_answer)),
    )


def _other_question(rng: Random, accepts: Accepts) -> Dialogue:
    """Two or three questions about one table."""
    data = draw(lambda: table.random_table(rng), table.key_of, accepts)
    replies = [ask(rng, data) for ask in rng.sample(table.QUESTIONS, rng.randint(2, 3))]
    turns = [
        Turn(table.introduced(rng, data, replies[0].question), table.told(rng, replies[0]), replies[0].final_answer)
    ]
    for reply in replies[1:]:
        lead = rng.choice(("", "Thanks. ", "And one more: ", "Good. Next: "))
        turns.append(Turn(lead + reply.question, table.told(rng, reply), reply.final_answer))
    return Dialogue((table.key_of(data),), tuple(turns))


def _other_form(rng: Random, accepts: Accepts) -> Dialogue:
    """One sentence put into two or three forms."""
    sentence = draw(lambda: rewrite.random_sentence(rng), rewrite.sentence_key, accepts)
    source, first, *others = rng.sample(rewrite.FORMS, rng.randint(3, 4))
    question = rewrite.asked(rng, rewrite.form_task(rng, first), capitalized(source.build(sentence)))
    turns = [Turn(question, rewrite.form_answer(rng, sentence, first), capitalized(first.build(sentence)))]
    for form in others:
        ask = pick(
            rng,
            f"Now make it {form.name}.",
            f"And in {form.name}?",
            f"Good. Now as {form.name}, please.",
            f"{rewrite.form_task(rng, form)}.",
        )
        turns.append(Turn(ask, rewrite.form_answer(rng, sentence, form), capitalized(form.build(sentence))))
    return Dialogue((rewrite.sentence_key(sentence),), tuple(turns))


def _changed_function(rng: Random, accepts: Accepts) -> Dialogue:
    """A function, then the same with another condition."""
    task = draw(lambda: functions.random_task(rng), functions.task_key, accepts)

    variants = (task._replace(keep=functions.random_filter(rng)) for _ in range(VARIANT_TRIES))
    changed = next(
        (v for v in variants if v.keep.code != task.keep.code and v.results() and accepts(functions.task_key(v))), None
    )
    if changed is None:
        return _changed_function(rng, accepts)
    name, parameter = functions.random_name(rng, task), rng.choice(functions.PARAMETERS)
    question = (
        f"Write a Python function {name}({parameter}) that returns {functions.wanted(task)}. "
        f"Use {list(task.values)} as an example."
    )
    ask = pick(
        rng,
        f"Change it so that it keeps the numbers that are {changed.keep.words}.",
        f"Now only for numbers that are {changed.keep.words}, please.",
        f"What if it should use numbers that are {changed.keep.words} instead?",
    )
    turns = [
        Turn(
            text,
            f"{functions.block(functions.source(rng, each, name, parameter))}\n\n{functions.explained(rng, each)}",
            _value(each),
        )
        for text, each in ((question, task), (ask, changed))
    ]
    return Dialogue((functions.task_key(task), functions.task_key(changed)), tuple(turns))


def _value(task: functions.Task) -> str:
    return str(int(task.reduce.apply(task.results())))


def _thanks(rng: Random, accepts: Accepts) -> Dialogue:
    """A solved problem and a word of thanks."""
    problem = rng.choice((arithmetic, rewrite)).sample(rng, accepts)
    name = rng.choice(NAMES)
    ask = rng.choice(
        ("Thank you!", "Thanks, that helps.", f"Great, thank you. {name} will be glad.", "Perfect, thanks a lot!")
    )
    offer = rng.choice(
        ("send me another one whenever you like", "ask again if a step is unclear", "I can also check a similar one")
    )
    reply = f"You're welcome! {rng.choice(('If you want,', 'Any time:'))} {offer}."
    return Dialogue(
        (problem.key,), (Turn(problem.question, problem.answer, problem.final_answer), Turn(ask, reply, None))
    )


TASKS: tuple[Callable[[Random, Accepts], Dialogue], ...] = (
    _changed_number, _changed_number, _explained_step, _result_only,
    _other_question, _other_form, _changed_function, _thanks,
)  # fmt: skip


def sample(rng: Random, accepts: Accepts) -> Dialogue:
    """A dialogue of two or three turns."""
    return rng.choice(TASKS)(rng, accepts)

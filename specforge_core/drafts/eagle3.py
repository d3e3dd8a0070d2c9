"""The EAGLE-3 draft (arXiv 2503.01840) and its training-time test; EAGLE-3.1 with `fc_norm` and `norm_output`.

T tokens of a packed batch, L = 3 captured layers, D width of draft and target, N query heads, M KV heads, C head width,
V target vocabulary, W draft vocabulary, S steps of training-time test, R supervised slots.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specforge_core.drafts.base import DraftBatch, DraftLoss, DraftModel, TargetHead
from specforge_core.drafts.eagle3_config import ARCHITECTURE, llama_config, make_serving_config
from specforge_core.drafts.layers import Eagle3Layer, RMSNorm, at_least_float32
from specforge_core.manifest import Eagle3Config

NUM_AUX_LAYERS = 3
# Measured on the demo target: fc as an average of its layers, the middle layer as a copy of the target's last one, or
# noise scaled by the fan-in all reach a lower acceptance length than small noise does; so does a random head.
INIT_STD = 0.02


class Teacher(NamedTuple):
    """What supervised slot r is taught at step 0; at step i it is taught what slot r + i is taught at step 0."""

    probability_RW: Tensor
    """The target's distribution, renormalised over the draft vocabulary."""
    kept_mass_R: Tensor
    """The target's probability of the draft vocabulary: probability * kept_mass is the target's own."""
    argmax_R: Tensor
    """int64, target vocabulary."""
    is_kept_R: Tensor
    """bool, whether `argmax` is in the draft vocabulary."""


class StepLoss(NamedTuple):
    """Sums over the active rows of one step."""

    loss_sum: Tensor
    correct: Tensor
    accepted: Tensor
    valid: Tensor


class Eagle3Draft(DraftModel):
    """One decoder layer over fused hidden states of the target and the embedding of the next token.

    Parameters carry their serving names. The target's embedding is a frozen buffer that is not exported, because
    the server shares the target's.
    """

    teacher_head: Tensor | None
    """[W, D], the target head's rows of the draft vocabulary; None in a draft that is only decoded with."""

    def __init__(self, serving_config: dict[str, Any], embedding_VD: Tensor) -> None:
        """An untrained draft without vocabulary or teacher: use `create` or `from_serving`."""
        super().__init__()
        config = llama_config(serving_config)
        width = config.hidden_size
        if embedding_VD.shape != (serving_config["vocab_size"], width):
            raise ValueError(
                f"the target's embedding is {tuple(embedding_VD.shape)}, the draft's config says "
                f"vocab_size={serving_config['vocab_size']} and hidden_size={width}; they must be of one target"
            )
        target_width = serving_config.get("target_hidden_size", width)
        if target_width != width:
            raise ValueError(
                f"target_hidden_size={target_width} with hidden_size={width}: other widths are unsupported"
            )
        self._serving_config = copy.deepcopy(serving_config)
        self.norm_output: bool = serving_config["norm_output"]
        self.fc = nn.Linear(NUM_AUX_LAYERS * width, width, bias=False)
        if serving_config["fc_norm"]:
            self.fc_norm = nn.ModuleList(RMSNorm(width, config.rms_norm_eps) for _ in range(NUM_AUX_LAYERS))
        self.midlayer = Eagle3Layer(config)
        self.norm = RMSNorm(width, config.rms_norm_eps)
        self.lm_head = nn.Linear(width, serving_config["draft_vocab_size"], bias=False)
        self.d2t = nn.Buffer(torch.zeros(serving_config["draft_vocab_size"], dtype=torch.int64))
        self.t2d = nn.Buffer(torch.zeros(serving_config["vocab_size"], dtype=torch.bool))
        self.embed_tokens = nn.Buffer(embedding_VD.detach(), persistent=False)
        self.register_buffer("teacher_head", None, persistent=False)
        self.num_positions = 0
        self.step_loss_decay = 1.0

    @classmethod
    def capture_layers(cls, aux_layers: tuple[int, ...] | None, num_target_layers: int) -> tuple[int, ...]:
        """The layers given, or [1, N//2 - 1, N - 4] of N. Raises: ValueError if these are not three ascending ones."""
        layers = aux_layers or (1, num_target_layers // 2 - 1, num_target_layers - 4)
        # The server captures layer INPUTS, so the output of the last layer is out of its reach.
        in_reach = all(0 <= layer < num_target_layers - 1 for layer in layers)
        if len(layers) != NUM_AUX_LAYERS or list(layers) != sorted(set(layers)) or not in_reach:
            raise ValueError(
                f"EAGLE-3 reads the outputs of {NUM_AUX_LAYERS} ascending layers from 0 to {num_target_layers - 2} "
                f"of a target of {num_target_layers} layers, not {list(layers)}; set draft.aux_layers"
            )
        return tuple(layers)

    @classmethod
    def create(
        cls,
        config: Eagle3Config,
        target_config: dict[str, Any],
        head: TargetHead,
        draft_token_ids: Tensor,
        capture_layers: tuple[int, ...],
    ) -> "Eagle3Draft":
        """A fresh draft that starts from the target's head and final norm; other weights from torch's generator."""
        vocab_size = head.embedding_VD.shape[0]
        serving_config = make_serving_config(config, target_config, capture_layers) | {
            "vocab_size": vocab_size,
            "draft_vocab_size": len(draft_token_ids),
        }
        draft = cls(serving_config, head.embedding_VD)
        for parameter in draft.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=INIT_STD)
        kept_head_WD = head.lm_head_VD.detach()[draft_token_ids]
        with torch.no_grad():
            draft.lm_head.weight.copy_(kept_head_WD)
            if head.final_norm_D is not None:
                draft.norm.weight.copy_(head.final_norm_D)
            draft.d2t.copy_(draft_token_ids - torch.arange(len(draft_token_ids)))
            draft.t2d[draft_token_ids] = True
        draft.teacher_head = kept_head_WD.clone()
        draft.num_positions, draft.step_loss_decay = config.num_steps, config.step_loss_decay
        return draft

    @classmethod
    def from_serving(cls, config: dict[str, Any], state_dict: dict[str, Tensor], embedding_VD: Tensor) -> "Eagle3Draft":
        """The draft of an exported checkpoint, in float32, to decode with; it has no teacher and cannot be trained.

        Raises: ValueError if a tensor is missing or unknown, or the two vocabulary maps disagree.
        """
        draft = cls(config, embedding_VD)
        expected = draft.state_dict().keys()
        missing, unknown = sorted(expected - state_dict.keys()), sorted(state_dict.keys() - expected)
        if missing or unknown:
            raise ValueError(f"not the tensors of {ARCHITECTURE}: missing {missing}, unknown {unknown}")
        draft.load_state_dict(state_dict)
        kept_ids = draft.draft_to_target(torch.arange(len(draft.d2t)))
        if not torch.equal(kept_ids, draft.t2d.nonzero().squeeze(1)):
            raise ValueError(
                "d2t and t2d name different tokens: nonzero(t2d) must equal d2t + arange(draft vocabulary)"
            )
        return draft

    def serving_config(self) -> dict[str, Any]:
        return copy.deepcopy(self._serving_config)

    def serving_state_dict(self) -> dict[str, Tensor]:
        """The tensors under SGLang's names, on the CPU, in the dtype that they are trained in."""
        return {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}

    @property
    def layer(self) -> Eagle3Layer:
        """The decoder layer."""
        return self.midlayer

    def embed(self, input_ids_T: Tensor) -> Tensor:
        """The target's embedding of target token ids, in the draft's dtype."""
        return F.embedding(input_ids_T, self.embed_tokens).to(self.fc.weight.dtype)

    def fuse(self, aux_hidden_TLD: Tensor) -> Tensor:
        """The first hidden state [..., D], from the target's captured layers [..., L, D]."""
        aux_hidden_TLD = aux_hidden_TLD.to(self.fc.weight.dtype)
        if self._serving_config["fc_norm"]:
            layers = zip(self.fc_norm, aux_hidden_TLD.unbind(-2), strict=True)
            aux_hidden_TLD = torch.stack([norm(hidden_TD) for norm, hidden_TD in layers], dim=-2)
        return self.fc(aux_hidden_TLD.flatten(-2))

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Logits over the draft vocabulary [..., W] of a layer output."""
        return self.lm_head(self.norm(hidden_TD))

    def recurrent(self, hidden_TD: Tensor) -> Tensor:
        """What the next step takes for its hidden state: the layer output, normed if `norm_output` says so."""
        return self.norm(hidden_TD) if self.norm_output else hidden_TD

    def draft_to_target(self, draft_ids: Tensor) -> Tensor:
        """Target token ids of draft vocabulary ids."""
        return draft_ids + self.d2t[draft_ids]

    def forward(self, batch: DraftBatch) -> DraftLoss:
        """The loss of S steps of training-time test, as sums over supervised slots.

        Slot t at step i consumes token x[t+1+i] and a hidden state: at step 0 that of the target at t (a[t], fused),
        afterwards its own output of step i-1. It predicts x[t+2+i] and is taught p[t+1+i], the target's distribution
        of that token. The hidden state stays in its slot; tokens and teacher shift. With a prompt x0..x3 and an
        answer x4..x7:

                            slot 2        slot 3        slot 4        slot 5        slot 6
            step 0  reads   x3 a2         x4 a3         x5 a4         x6 a5         x7 a6
                    teacher p3 (for x4)   p4 (for x5)   p5 (for x6)   p6 (for x7)   p7 (for -)
                    active  0             1             1             1             0
            step 1  reads   x4            x5            x6            x7            -
                    teacher p4 (for x5)   p5 (for x6)   p6 (for x7)   p7 (for -)    -
                    active  0             1             1             0             0

        Serving starts a chain in slot t only when x[t+1] came from the target, and a chain must stay in its answer:
        active_i[t] = m[t+1] and ... and m[t+2+i] in the document of t. The public trainers gate with m[t], which
        never trains slot 3, the first of each answer.

        Returns: `loss_sum` = sum_i decay^i * sum over active_i of the cross entropy to the teacher renormalised over
        the draft vocabulary; `num_tokens` = slots active at step 0. A row whose teacher's favourite is outside the
        draft vocabulary has no loss and counts as a miss.
        """
        active_ST = active_slots(batch, self.num_positions)
        slots_R = active_ST[0].nonzero().squeeze(1)
        teacher = self._teacher(batch, slots_R + 1)
        steps = []
        for step, hidden_TD in enumerate(self._layer_outputs(batch, self.num_positions)):
            rows = active_ST[step][slots_R].nonzero().squeeze(1)
            taught = Teacher(*(part[rows + step] for part in teacher))
            steps.append(self._step_loss(hidden_TD[slots_R[rows]], taught))
        total = StepLoss(*(torch.stack(sums) for sums in zip(*steps, strict=True)))
        weight_S = self.step_loss_decay ** torch.arange(self.num_positions).to(total.loss_sum)
        return DraftLoss(
            loss_sum=(weight_S * total.loss_sum).sum(),
            num_tokens=total.valid[0],
            correct_K=total.correct,
            accepted_K=total.accepted,
            valid_K=total.valid,
        )

    @torch.no_grad()
    def greedy_chains(self, batch: DraftBatch, num_tokens: int) -> Tensor:
        hidden = self._layer_outputs(batch, num_tokens)
        return torch.stack([self.draft_to_target(self.logits(hidden_TD).argmax(-1)) for hidden_TD in hidden])

    def _layer_outputs(self, batch: DraftBatch, num_steps: int) -> Iterator[Tensor]:
        """The layer's output [T, D] at each step, the data's tokens going in."""
        lengths = document_lengths(batch.document_ids_T)
        embedding_TD = self.embed(batch.input_ids_T)
        hidden_TD = self.fuse(batch.aux_hidden_TLD)
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for step in range(num_steps):
            # The rows that wrap around are slots at a document's end, which nothing active reads.
            next_embedding_TD = embedding_TD.roll(-1 - step, dims=0)
            qkv = self.midlayer.project_qkv(next_embedding_TD, hidden_TD, batch.position_ids_T + step)
            keys.append(qkv.key_TMC)
            values.append(qkv.value_TMC)
            output_TD = self.midlayer.finish(hidden_TD, attend(qkv.query_TNC, keys, values, lengths))
            yield output_TD
            hidden_TD = self.recurrent(output_TD)

    @torch.no_grad()
    def _teacher(self, batch: DraftBatch, token_index_R: Tensor) -> Teacher:
        if self.teacher_head is None:
            raise ValueError("this draft was loaded to decode: only one made by `create` has a teacher")
        # As capture computed argmax and log-sum-exp: rounded logits would give the kept tokens more than all of them.
        with torch.autocast(self.teacher_head.device.type, enabled=False):
            last_hidden_RD = at_least_float32(batch.last_hidden_TD[token_index_R])
            logits_RW = F.linear(last_hidden_RD, at_least_float32(self.teacher_head))
        argmax_R = batch.target_argmax_T[token_index_R].long()
        return Teacher(
            probability_RW=logits_RW.softmax(-1),
            kept_mass_R=(logits_RW.logsumexp(-1) - batch.target_logsumexp_T[token_index_R]).exp(),
            argmax_R=argmax_R,
            is_kept_R=self.t2d[argmax_R],
        )

    def _step_loss(self, hidden_RD: Tensor, teacher: Teacher) -> StepLoss:
        logits_RW = at_least_float32(self.logits(hidden_RD))
        loss_R = F.cross_entropy(logits_RW, teacher.probability_RW, reduction="none") * teacher.is_kept_R
        with torch.no_grad():
            target_RW = teacher.probability_RW * teacher.kept_mass_R.unsqueeze(1)
            accepted_R = torch.minimum(logits_RW.softmax(-1), target_RW).sum(-1) * teacher.is_kept_R
            is_correct_R = self.draft_to_target(logits_RW.argmax(-1)) == teacher.argmax_R
        return StepLoss(
            loss_sum=loss_R.sum(),
            correct=is_correct_R.sum().to(loss_R.dtype),
            accepted=accepted_R.sum(),
            valid=torch.ones_like(loss_R).sum(),
        )


def active_slots(batch: DraftBatch, num_steps: int) -> Tensor:
    """bool [S, T]: whether slot t at step i is supervised. Step i + 1 is within step i."""

    def later(x_T: Tensor, shift: int, fill: int) -> Tensor:
        return F.pad(x_T, (0, shift), value=fill)[shift:]

    def is_answer(shift: int) -> Tensor:
        in_document_T = later(batch.document_ids_T, shift, -1) == batch.document_ids_T
        return later(batch.loss_mask_T, shift, 0) & in_document_T & (batch.document_ids_T >= 0)

    steps = [is_answer(1) & is_answer(2)]
    for step in range(1, num_steps):
        steps.append(steps[-1] & is_answer(2 + step))
    return torch.stack(steps)


def document_lengths(document_ids_T: Tensor) -> list[int]:
    """Lengths of the documents in their order; padding at the end counts as one more."""
    _, counts = document_ids_T.unique_consecutive(return_counts=True)
    return counts.tolist()


def attend(query_TNC: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
    """The attention's output of the latest step, [T, N C].

    Slot t reads the step-0 keys of slots up to t in its document, and of the later steps its own keys alone.

    Args: keys, values: [T, M, C] of every step so far, the first one first; lengths: of the documents, adding up to T.
    """
    num_kv_heads = keys[0].shape[1]
    # M KV heads x G query heads for each; queries are scaled once, before they meet either kind of key.
    query_TMGC = query_TNC.unflatten(1, (num_kv_heads, -1)) * query_TNC.shape[-1] ** -0.5
    own_logits = [(query_TMGC * key_TMC.unsqueeze(2)).sum(-1) for key_TMC in keys[1:]]
    own_logits_TMGJ = torch.stack(own_logits, dim=-1) if own_logits else query_TMGC[..., :0]
    is_future = torch.ones(max(lengths), max(lengths), dtype=torch.bool, device=query_TNC.device).triu(1)
    attended = []
    own_weights = []
    parts = (x.split(lengths) for x in (query_TMGC, keys[0], values[0], own_logits_TMGJ))
    for query, key, value, own in zip(*parts, strict=True):
        n = len(query)
        logits_MGTU = torch.einsum("tmgc,umc->mgtu", query, key).masked_fill(is_future[:n, :n], -torch.inf)
        weight = at_least_float32(torch.cat((logits_MGTU, own.permute(1, 2, 0, 3)), dim=-1)).softmax(-1).to(value.dtype)
        attended.append(torch.einsum("mgtu,umc->tmgc", weight[..., :n], value))
        own_weights.append(weight[..., n:].permute(2, 0, 1, 3))
    attended_TMGC = torch.cat(attended)
    own_weight_TMGJ = torch.cat(own_weights)
    for j, value_TMC in enumerate(values[1:]):
        attended_TMGC = attended_TMGC + own_weight_TMGJ[..., j, None] * value_TMC.unsqueeze(2)
    return attended_TMGC.flatten(1)

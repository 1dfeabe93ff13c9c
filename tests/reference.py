"""Plain single-process references on transformers' own modules, in float64: what the sharded code must reproduce."""

import copy

import numpy as np
import torch


def importance(
    model, samples: list[torch.Tensor], sequence: str, batch: str, heads: str = "per_token"
) -> dict[str, np.ndarray]:
    """Scores by hooks on a transformers model, one sample at a time, written out from the paper's definitions."""
    model = model.double()
    config, head_dim = model.config, model.model.layers[0].self_attn.head_dim
    layers = model.model.layers
    seen: dict[tuple[str, int], list[torch.Tensor]] = {}

    def keep(name: str, layer: int, activations: torch.Tensor) -> None:
        seen.setdefault((name, layer), []).append(_over_sequence(activations[0], sequence))

    handles = []
    for i, layer in enumerate(layers):
        per_head = (config.num_attention_heads, head_dim)
        handles += [
            layer.mlp.down_proj.register_forward_pre_hook(lambda m, a, i=i: keep("ffn", i, a[0])),
            layer.self_attn.o_proj.register_forward_pre_hook(
                lambda m, a, i=i, per_head=per_head: keep(
                    "heads", i, a[0].unflatten(-1, per_head).norm(dim=-1) if heads == "per_token" else a[0]
                )
            ),
            layer.input_layernorm.register_forward_hook(lambda m, a, o, i=i: keep("hidden.attention_norm", i, o)),
            layer.post_attention_layernorm.register_forward_hook(lambda m, a, o, i=i: keep("hidden.mlp_norm", i, o)),
            layer.register_forward_hook(lambda m, a, o, i=i: _influence(seen, i, a[0], o)),
        ]
    with torch.no_grad():
        for tokens in samples:
            model(tokens[None])
    for handle in handles:
        handle.remove()
    names = ("ffn", "heads", "hidden.attention_norm", "hidden.mlp_norm")
    found = {
        name: np.stack([_over_batch(torch.stack(seen[(name, i)]), batch).numpy() for i in range(len(layers))])
        for name in names
    }
    if heads == "per_channel":
        found["heads"] = np.linalg.norm(found["heads"].reshape(len(layers), -1, head_dim), axis=-1)
    found["vocab"] = np.bincount(torch.cat(samples).numpy(), minlength=config.vocab_size)
    found["layers"] = np.array([float(torch.stack(seen[("layers", i)]).mean()) for i in range(len(layers))])
    return found


def _influence(seen, layer: int, before: torch.Tensor, out) -> None:
    after = out[0] if isinstance(out, tuple) else out
    cosine = torch.nn.functional.cosine_similarity(before[0], after.reshape(before.shape)[0], dim=-1)
    seen.setdefault(("layers", layer), []).append(1 - cosine.mean())


def _over_sequence(a: torch.Tensor, how: str) -> torch.Tensor:
    if how == "mean":
        return a.abs().mean(0)
    return a.square().sum(0).sqrt() if how == "l2" else a.var(0, correction=0)


def _over_batch(x: torch.Tensor, how: str) -> torch.Tensor:
    if how == "mean":
        return x.mean(0)
    return x.square().sum(0).sqrt() if how == "l2" else x.var(0, correction=0)


def kl(student: torch.Tensor, teacher: torch.Tensor, vocab_size: int, temperature: float) -> torch.Tensor:
    """T² KL(teacher ‖ student) per token over the real vocabulary, by torch's own softmax."""
    log_q = torch.log_softmax(student[..., :vocab_size] / temperature, -1)
    log_p = torch.log_softmax(teacher[..., :vocab_size] / temperature, -1)
    return temperature**2 * torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def divergence(student: torch.Tensor, teacher: torch.Tensor, vocab_size: int, how) -> torch.Tensor:
    """What distill/losses.py says of each kind, written down term by term; autograd has the gradient."""
    kind, t = how.kind, how.temperature
    log_q, log_p = (torch.log_softmax(z[..., :vocab_size] / t, -1) for z in (student, teacher))
    q, p = log_q.exp(), log_p.exp()
    if kind == "forward_kl":
        loss = (p * (log_p - log_q)).sum(-1)
    elif kind == "reverse_kl":
        loss = (q * (log_q - log_p)).sum(-1)
    elif kind == "jsd":
        m = how.beta * p + (1 - how.beta) * q
        loss = how.beta * (p * (p / m).log()).sum(-1) + (1 - how.beta) * (q * (q / m).log()).sum(-1)
    else:
        # Equal values by their number: a stable sort keeps their order.
        ids = torch.sort(teacher[..., :vocab_size], dim=-1, descending=True, stable=True).indices[..., : how.top_k]
        inside_p, inside_q = p.gather(-1, ids), q.gather(-1, ids)
        if how.rest == "renormalize":
            inside_p = inside_p / inside_p.sum(-1, keepdim=True)
        loss = (inside_p * (inside_p / inside_q).log()).sum(-1)
        if how.rest == "bucket":
            rest_p, rest_q = 1 - inside_p.sum(-1), 1 - inside_q.sum(-1)
            loss = loss + rest_p * (rest_p / rest_q).log()
    return t**2 * loss


def distillation_terms(student, teacher, vocab_size: int, how, labels: torch.Tensor, cross_entropy: float) -> dict:
    """Every term of a distillation loss per token, and the loss: entropy and agreement are of the plain softmaxes."""
    log_q, log_p = (torch.log_softmax(z[..., :vocab_size], -1) for z in (student, teacher))
    terms = {
        "divergence": divergence(student, teacher, vocab_size, how),
        "cross_entropy": -log_q.gather(-1, labels[..., None])[..., 0],
        "agreement": (log_q.argmax(-1) == log_p.argmax(-1)).float(),
        "teacher_entropy": -(log_p.exp() * log_p).sum(-1),
    }
    return {**terms, "loss": terms["divergence"] + cross_entropy * terms["cross_entropy"]}


def without_layers(model, removed: range):
    """The transformers model with layers deleted, float64; a copy."""
    cut = copy.deepcopy(model).double()
    cut.model.layers = torch.nn.ModuleList(layer for i, layer in enumerate(cut.model.layers) if i not in removed)
    cut.config.num_hidden_layers = len(cut.model.layers)
    # The layers that stay have their old numbers, under which a cache would look for them.
    cut.config.use_cache = False
    return cut


def log_likelihood(model, tokens: torch.Tensor, scored: int) -> float:
    """Σ log p of the last `scored` of some tokens, given those before them."""
    with torch.no_grad():
        log_p = torch.log_softmax(model(tokens[None, :-1]).logits[0], -1)
    return float(log_p.gather(-1, tokens[1:, None])[-scored:].sum())


def block_influence(model, removed: range, samples: list[torch.Tensor]) -> float:
    """1 − mean of cos(what enters the block, what leaves it) over all tokens, float64."""
    states, model = [], copy.deepcopy(model).double()
    model.model.layers[removed[0]].register_forward_pre_hook(lambda m, args: states.append(args[0]))
    model.model.layers[removed[-1]].register_forward_hook(
        lambda m, a, o: states.append(o[0] if type(o) is tuple else o)
    )
    with torch.no_grad():
        for tokens in samples:
            model(tokens[None], use_cache=False)
    pairs = zip(states[::2], states[1::2], strict=True)
    return 1 - float(torch.stack([torch.cosine_similarity(x, y, dim=-1).mean() for x, y in pairs]).mean())


# What the dimensions of Hugging Face's tensors run along, by module; None is never cut.
DIMENSIONS = {
    "embed_tokens": ("vocab", "hidden"),
    "lm_head": ("vocab", "hidden"),
    "q_proj": ("q", "hidden"),
    "k_proj": ("k", "hidden"),
    "v_proj": ("k", "hidden"),
    "o_proj": ("hidden", "o"),
    "gate_proj": ("ffn", "hidden"),
    "up_proj": ("ffn", "hidden"),
    "down_proj": ("hidden", "ffn"),
    "input_layernorm": ("hidden",),
    "post_attention_layernorm": ("hidden",),
    "norm": ("hidden",),
    "q_norm": (None,),
    "k_norm": (None,),
}


def cut(weights: dict[str, torch.Tensor], kept, source) -> dict[str, torch.Tensor]:
    """Hugging Face tensors with only what is kept, written out head by head: what pruning must give, bit for bit."""
    out = {}
    for name, tensor in weights.items():
        words = name.split(".")
        layer = int(words[2]) if "layers" in words else None
        if layer is not None and layer not in kept.layers:
            continue
        if layer is not None:
            words[2] = str(kept.layers.tolist().index(layer))
        for dim, axis in enumerate(DIMENSIONS[words[-2]][: tensor.ndim]):
            rows = _cut_rows(tensor.movedim(dim, 0), axis, layer, kept, source)
            tensor = rows.movedim(0, dim).contiguous()
        out[".".join(words)] = tensor
    return out


def _cut_rows(rows: torch.Tensor, axis: str | None, layer: int | None, kept, source) -> torch.Tensor:
    """One axis, along the first dimension."""
    if axis in ("hidden", "vocab"):
        whole = getattr(kept, axis)
        return rows if whole is None else rows[torch.from_numpy(whole)]
    if axis == "ffn":
        return rows if kept.ffn is None else rows[torch.from_numpy(kept.ffn[layer])]
    if axis is None or kept.heads is None:
        return rows
    by_head = rows.float().unflatten(0, (-1, source.head_dim))
    groups, heads = torch.from_numpy(kept.kv_groups[layer]), torch.from_numpy(kept.heads[layer].reshape(-1))
    plain = source.heads_per_group == 1 and groups.shape[1] == 1
    new = by_head[groups].mean(1) if axis == "k" and not plain else by_head[heads]
    if kept.partners is not None and (axis == "q" or (axis == "k" and plain)):
        partners = torch.from_numpy(kept.partners[layer].reshape(-1))
        merged = partners >= 0
        new[merged] = 2 * new[merged] - by_head[partners[merged]]
    return new.flatten(0, 1).to(rows.dtype)


def states(model, tokens: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(logits, states [b, s, hidden]: what each layer gives, and last of all, at −1, the embeddings)."""
    found = []
    modules = [*model.model.layers, model.model.embed_tokens]
    handles = [m.register_forward_hook(lambda m, a, o, i=i: found.append((i, o))) for i, m in enumerate(modules)]
    logits = model(tokens).logits
    for handle in handles:
        handle.remove()
    return logits, [out[0] if type(out) is tuple else out for _, out in sorted(found, key=lambda item: item[0])]


def state_distance(student: torch.Tensor, teacher: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """1 − cos of the student's normalised state, mapped up, and the teacher's, per token; written out."""
    student, teacher = (
        (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        for x in (student, teacher)
    )
    mapped = student @ weight.T
    return 1 - (mapped * teacher).sum(-1) / (mapped.norm(dim=-1) * teacher.norm(dim=-1))

"""The probe: the logits of a few fixed inputs, stored beside the weights and found again after loading, at any shape.

Digests say that a checkpoint's bytes are those that were written. The probe says that they mean the same model to the
ranks that have read them: a slice that went to another rank, rows in another order, a changed activation.

Legend: B batch, T tokens, M positions, V vocabulary.
"""

import logging

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xlscale.config_sections import Config, ModelConfig
from xlscale.parallel.sharded import ShardedModel

log = logging.getLogger(__name__)

ROWS, TOKENS = 4, 32
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Number format of the forward pass -> what the logits of a position may be off by, in the L2 norm, of their spread.

Another shape rounds its partial sums elsewhere. With every product of a random model of 12 or 48 layers summed in four
parts, bf16 logits are off by 0.8e-2 to 3e-2 (0.15 for 48 post-LN layers of weights five times as wide), fp32 ones by
some 1e-6. Halves that have changed places in every layer's weight of a kind, or in the embedding, make 0.5 to 1.4; but
queries while attention is still flat 4e-2, and those of one layer alone less: that only fp32 sees. What all logits of a
position share means nothing, and the rounding of that is allowed on top.
"""
_WAY_OUT = "restore [model], or report it; checkpoint.probe = false goes on all the same"


def probe(sharded: ShardedModel, config: Config) -> dict[str, Tensor]:
    """The fixed inputs and their logits, on the CPU, the same on all ranks; nothing when checkpoint.probe is off.

    `input_ids` [B, T], `positions` [B, T] (bool: those that are looked at), with adapters `lang_ids` [B], and `logits`
    [M, V] as the forward pass gave them. Collective.
    """
    if not config.checkpoint.probe:
        return {}
    inputs = probe_inputs(config.model, min(TOKENS, config.data.sequence_length))
    return inputs | {"logits": _logits(sharded, inputs)}


def probe_problems(sharded: ShardedModel, stored: dict[str, Tensor], where: str, changed: list[str]) -> list[str]:
    """A line when the loaded model does not give the logits in `stored`, which probe() made. Collective.

    where: the checkpoint. changed: what the config says otherwise than when it was written.
    """
    if not stored:  # saved with checkpoint.probe = false, or by an older version
        return []
    wanted_MV = stored["logits"]
    if not wanted_MV.isfinite().all():
        log.warning("%s: its own probe's logits are not finite; they are not compared", where)
        return []
    found_MV = _logits(sharded, stored)
    if found_MV.shape != wanted_MV.shape:
        return [f"{where}: its probe has logits {list(wanted_MV.shape)}, here are {list(found_MV.shape)}; {_WAY_OUT}"]
    off, tolerance = farthest(found_MV, wanted_MV)
    if off <= tolerance:  # a NaN is not
        log.info("the probe's logits are those of the checkpoint, to %.1e (%.1e is allowed)", off, tolerance)
        return []
    because = [line for line in changed if line.startswith(("model.", "deepspeed."))]
    cause = f"the config has changed: {'; '.join(because)}" if because else "every byte is as it was written"
    return [
        f"{where}: the model that was loaded gives other logits than the one that was saved, off by {off:.1e} of "
        f"their spread where {tolerance:.1e} is rounding; {cause}; {_WAY_OUT}"
    ]


def probe_inputs(model: ModelConfig, tokens: int) -> dict[str, Tensor]:
    """The same ids for every model with as many pieces, each row shorter than the last; two positions of each."""
    rng = np.random.Generator(np.random.Philox(key=(0, model.vocab_size)))
    ids_BT = torch.from_numpy(rng.integers(0, model.vocab_size, (ROWS, tokens)))
    ids_BT[ids_BT == model.pad_token_id] = model.eos_token_id
    positions_BT = torch.zeros(ROWS, tokens, dtype=torch.bool)
    for row in range(ROWS):
        length = tokens - row * tokens // (2 * ROWS)
        ids_BT[row, length:] = model.pad_token_id
        positions_BT[row, [1, length - 1]] = True
    inputs = {"input_ids": ids_BT, "positions": positions_BT}
    if model.languages:
        inputs["lang_ids"] = torch.arange(ROWS) % len(model.languages)
    return inputs


def farthest(found_MV: Tensor, wanted_MV: Tensor) -> tuple[float, float]:
    """How far the worst position's logits are from those wanted, of their spread, and how far they may be."""
    dtype = max((found_MV.dtype, wanted_MV.dtype), key=lambda each: torch.finfo(each).eps)
    found_MV, wanted_MV = found_MV.double(), wanted_MV.double()
    spread_M = (wanted_MV - wanted_MV.mean(1, keepdim=True)).norm(dim=1)
    rounding_M = torch.finfo(dtype).eps * wanted_MV.norm(dim=1)
    off_M = ((found_MV - wanted_MV).norm(dim=1) - rounding_M).clamp(min=0.0) / spread_M
    return float(off_M.max()), TOLERANCES[dtype]


def _logits(sharded: ShardedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Logits [M, V] of the probe's positions, by all ranks on the same inputs, without dropout."""
    topology, engine = sharded.topology, sharded.engine
    config = engine.module.config
    fill = -inputs["input_ids"].shape[1] % topology.tp  # sequence parallelism shares the tokens out equally
    ids_BT = F.pad(inputs["input_ids"], (0, fill), value=config.pad_token_id).to(topology.device)
    positions_BT = F.pad(inputs["positions"], (0, fill)).to(topology.device)
    engine.eval()
    try:
        with torch.no_grad():
            output = engine(
                ids_BT,
                attention_mask=ids_BT != config.pad_token_id,
                positions=positions_BT,
                lang_ids=inputs.get("lang_ids"),
            )
    finally:
        engine.train()
    logits_MV: Tensor = output.logits_MV
    return logits_MV.cpu()

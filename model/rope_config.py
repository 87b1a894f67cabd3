"""How positions turn keys and queries, as `config.json` says it: plainly, or by YaRN (arXiv 2309.00071). No torch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from model.json_file import Fields, shown

_YARN_CHECKED = frozenset({"type", "rope_type", "rope_theta", "attention_factor", "truncate", "partial_rotary_factor"})


@dataclass(frozen=True, slots=True)
class YarnConfig:
    """Static YaRN (arXiv 2309.00071): applied at every length, also below `original_max_position_embeddings`."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def magnitude(self, mscale: float) -> float:
        """m(s, k) = 0.1 k ln s + 1, and 1 where nothing is stretched (s <= 1)."""
        return 1.0 if self.factor <= 1.0 else 0.1 * mscale * math.log(self.factor) + 1.0

    @property
    def amplitude(self) -> float:
        """What cos and sin are multiplied by: 1 in every public checkpoint, where both mscales are equal."""
        return self.magnitude(self.mscale) / self.magnitude(self.mscale_all_dim)


@dataclass(frozen=True, slots=True)
class RopeConfig:
    theta: float
    yarn: YarnConfig | None = None


def read_rope(fields: Fields) -> RopeConfig:
    """`rope_scaling` (hub) or `rope_parameters` (transformers 5); where both stand they must agree."""
    theta = fields.number("rope_theta", 1.000001, 1e12, 10000.0)
    found = {
        name: _read_rope_dict(fields, name, theta)
        for name in ("rope_scaling", "rope_parameters")
        if fields.values.get(name)
    }
    ropes = list(found.values()) or [RopeConfig(theta)]
    if any(rope != ropes[0] for rope in ropes):
        raise fields.fail("rope_scaling", "contradicts rope_parameters")
    return ropes[0]


def _read_rope_dict(parent: Fields, name: str, theta: float) -> RopeConfig:
    values = parent.values[name]
    if not isinstance(values, dict):
        raise parent.fail(name, f"must be an object, not {shown(values)}")
    fields = Fields(parent.file, values, f"{name}.")
    theta = fields.number("rope_theta", 1.000001, 1e12, theta)
    kind = fields.text(fields.first_of("rope_type", "type"), "default")
    if kind not in ("default", "yarn"):
        raise fields.fail("rope_type", f"{shown(kind)} is not supported (only default and yarn)")
    if fields.number("partial_rotary_factor", -1e9, 1e9, 1.0) != 1.0:
        raise fields.fail("partial_rotary_factor", "must be 1")
    if kind == "default":
        if values.get("mrope_section") is not None:
            raise fields.fail("mrope_section", "is not supported")
        return RopeConfig(theta)
    understood = {field.name for field in dataclasses.fields(YarnConfig)} | _YARN_CHECKED
    if unknown := sorted(values.keys() - understood):
        raise fields.fail(unknown[0], "is not known for yarn and may change the rotation")
    if not fields.flag("truncate", True):
        raise fields.fail("truncate", "false is not supported")
    mscale, mscale_all_dim = values.get("mscale"), values.get("mscale_all_dim")
    if (mscale is None) != (mscale_all_dim is None):
        raise fields.fail("mscale", "and mscale_all_dim must both be given or both be absent")
    yarn = YarnConfig(
        factor=fields.number("factor", 1.0, 1e6),
        original_max_position_embeddings=fields.integer("original_max_position_embeddings", 1, 1 << 24),
        beta_fast=fields.number("beta_fast", 1e-6, 1e6, 32.0),
        beta_slow=fields.number("beta_slow", 1e-6, 1e6, 1.0),
        mscale=fields.number("mscale", 0.0, 100.0, 1.0),
        mscale_all_dim=fields.number("mscale_all_dim", 0.0, 100.0, 0.0),
    )
    attention_factor = fields.number("attention_factor", 0.0, 1e6, None)
    if attention_factor is not None and not math.isclose(attention_factor, yarn.amplitude, rel_tol=1e-6):
        raise fields.fail("attention_factor", f"must be {yarn.amplitude:.6g}, as the mscales give, or absent")
    return RopeConfig(theta, yarn)

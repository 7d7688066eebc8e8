"""All mutants of all kinds of program, in fixed order, and the kinds by name."""

from __future__ import annotations

import attention_programs
import gated_programs
import norm_programs
import rotary_programs
from mutations import Mutant, mutants

KINDS: dict[str, tuple[Mutant, ...]] = {
    name: tuple(mutants(pass_name, kind.BASES, kind.MUTATIONS))
    for name, pass_name, kind in (
        ("attention", "fuse_attention", attention_programs),
        ("norm", "fuse_norm", norm_programs),
        ("gated activation", "fuse_mlp", gated_programs),
        ("rotary embedding", "fuse_rope", rotary_programs),
    )
}

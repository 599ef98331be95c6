"""Names of the checkpoint's modules and tensors -> of the served model's.

Copied into emitted files as it stands here; it may use the names that the file imports, and what
else is copied.
"""

from __future__ import annotations

import re

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import WeightsMapper
from vllm.platforms import current_platform

from compiler.vllm_weights import spelled_out


class AdaptersApart:
    """Requests without an adapter get none.

    For them, vLLM's kernels for CPUs read slot -1, the last adapter: here, an empty one.
    """

    @property
    def lora_manager(self):
        return self._lora_manager

    @lora_manager.setter
    def lora_manager(self, manager) -> None:  # given here once the layers hold slots
        self._lora_manager = manager
        for module in manager.modules.values() if current_platform.is_cpu() else ():
            for name in ("lora_a_stacked", "lora_b_stacked"):
                slots = getattr(module, name)
                several = isinstance(slots, tuple)
                parts = slots if several else (slots,)
                longer = tuple(torch.cat([s, torch.zeros_like(s[:1])]) for s in parts)
                setattr(module, name, longer if several else longer[0])
            if hasattr(module, "lora_a_stacked_2d"):
                module.lora_a_stacked_2d = module.lora_a_stacked.flatten(0, 1)


class ModuleNames(WeightsMapper):
    """Names of modules in the checkpoint -> here: adapters and quantisation name modules.

    An adapter for anything but `lora_targets` is refused: vLLM would serve without it.
    """

    def __init__(
        self,
        renamed: dict,
        lora_targets: dict,
        split: dict,
        repeated: dict,
    ) -> None:
        super().__init__()
        self.renamed = renamed
        self.lora_targets = lora_targets
        self.split = split
        self.repeated = repeated

    def map_name(self, key: str) -> str:
        module, of_adapter, _ = key.partition(".lora_")
        if of_adapter and module not in (targets := spelled_out(self.lora_targets)):
            raise ValueError(
                f"this model has no {module} that an adapter could change\n"
                f"  need: {', '.join(targets[:5])}, or another of {len(targets)} in all\n"
                f"  fix:  {self.fix(module)}"
            )
        matches = [(pattern.match(key), new) for pattern, new in self.renamed.items()]
        found = [(match.end(), [match.expand(n) for n in new]) for match, new in matches if match]
        end, renamed = max(found, default=(0, [""]))
        names = [name + key[end:] for name in renamed]
        # One that is several layers here: compressed-tensors takes a pattern for a name.
        return names[0] if len(names) == 1 else f"re:({'|'.join(map(re.escape, names))})$"

    def fix(self, module: str) -> str:
        """What to do about an adapter for a module that is no target."""
        parts, uses = (
            tensors.get(module) or tensors.get(f"{module}.weight")
            for tensors in (self.split, self.repeated)
        )
        if uses:
            return (
                "merge the adapter into the weights: the model uses this module in "
                f"{len(uses)} places, and an adapter would change one"
            )
        if parts:
            return f"name what is stacked in this module: {', '.join(parts)}"
        return "name modules in the adapter as the model's checkpoint does"


class CheckpointNames(WeightsMapper):
    """Names of tensors in the checkpoint -> of parameters here.

    The tensors of a quantised module are named as the module is, and end otherwise.
    """

    def __init__(
        self,
        lora_targets: dict,
        split: dict | None = None,
        repeated: dict | None = None,
        **names,
    ) -> None:
        renamed, ends = {}, {}
        tensors = names.get("orig_to_new_regex", {})
        for pattern, new in sorted(tensors.items(), key=lambda t: t[0].pattern.endswith("bias$")):
            if new is not None:
                module = re.sub(r"(\\\.(weight|bias))?\$$", "", pattern.pattern)
                other = "" if pattern.pattern == f"{module}$" else r"(?!(weight|bias)$)"
                new = re.sub(r"\.(weight|bias)$", "", new)
                # Also as a whole, of which each of several in one tensor is a numbered part.
                whole = re.sub(r"\\#\d+", "", module), re.sub(r"#\d+", "", new)
                for old, own in ((module, new), whole):
                    found = renamed.setdefault(re.compile(rf"{old}(?=\.|$)"), [])
                    if own not in found and not (found and pattern.pattern.endswith("bias$")):
                        found.append(own)
                    ends[re.compile(rf"{old}(?=\.{other})")] = found
        quantised = {pattern: new[0] for pattern, new in ends.items() if len(new) == 1}
        super().__init__(**{**names, "orig_to_new_regex": {**tensors, **quantised}})
        self.modules = ModuleNames(renamed, lora_targets, split or {}, repeated or {})

    def get_rename_mapper(self) -> ModuleNames:
        return self.modules


def name_ignored(vllm_config: VllmConfig, names: WeightsMapper, tensors: dict) -> None:
    """Leave out of a quantisation what the checkpoint does, under the names that it has here.

    vLLM takes a name without a dot of compressed-tensors' `ignore` for a class, and renames neither
    that nor a pattern: the layer would be made for quantised weights, and be given others, without
    an error.
    """
    ignored = getattr(vllm_config.quant_config, "ignore", None)
    if isinstance(ignored, list):
        patterns = [re.compile(name[3:]) for name in ignored if name.startswith("re:")]
        there = {re.sub(r"(#\d+)?(\.\w+)?$", "", name) for name in spelled_out(tensors)}
        found = [name for name in there if any(p.match(name) for p in patterns)]
        found += [name for name in ignored if "." not in name and not name.startswith("re:")]
        here = [names.get_rename_mapper().map_name(name) for name in sorted(found)]
        ignored += [name for name in here if name is not None and name not in ignored]

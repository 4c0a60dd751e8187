"""What the user says of a base."""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Reading:
    """What the user says of a base that neither it nor an adapter tells.

    `key_map` names modules on disk (values) that the adapter calls otherwise (keys: whole names, or
    leading parts of names). `fan_in_fan_out` says by patterns of module names whether weights are
    stored (in, out), as Conv1D has them, or (out, in), as nn.Linear; the first that matches counts.
    """

    key_map: Mapping[str, str] = field(default_factory=dict)
    fan_in_fan_out: Mapping[str, bool] = field(default_factory=dict)
    trust_remote_code: bool = False

    @classmethod
    def of(
        cls,
        key_map: Mapping[str, str] | None,
        fan_in_fan_out: Mapping[str, bool] | None,
        trust_remote_code: bool,
    ) -> "Reading":
        """Raises `TypeError` for what are no mappings."""
        if not isinstance(key_map or {}, Mapping):
            raise TypeError("key_map is a mapping of names to names")
        if not isinstance(fan_in_fan_out or {}, Mapping):
            raise TypeError("fan_in_fan_out is a mapping of patterns to bools")
        return cls(key_map or {}, fan_in_fan_out or {}, trust_remote_code)

    def is_transposed(self, module: str) -> bool | None:
        """What is said of the layout of a module; None when nothing is."""
        found = (v for p, v in self.fan_in_fan_out.items() if fnmatch.fnmatchcase(module, p))
        return next(found, None)


NOTHING_SAID: Reading = Reading()

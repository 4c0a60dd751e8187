"""One module of an adapter, and the rows of a stored tensor that its delta is added to."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gralora_convert.adapters.adapter import Adapter
from gralora_convert.disk import Rows

if TYPE_CHECKING:
    from gralora_convert.delta import Gralora, Lora


@dataclass(frozen=True, slots=True)
class Update:
    """The stored `rows` get `weight` times the rows of the delta of `module` that they name.

    `transposed`: of the delta's transpose, as the weight of a Conv1D is stored (in, out).
    """

    adapter: Adapter
    module: str
    rows: Rows
    transposed: bool = False
    weight: float = 1.0

    @property
    def nbytes(self) -> int:
        """Bytes of its factors once they are read."""
        return self.adapter.factor_bytes(self.module)

    @property
    def is_wide(self) -> bool:
        """Whether its factors are float64."""
        return any(spec.dtype == "F64" for spec in self.adapter.roles[self.module].values())

    @property
    def in_order(self) -> Rows:
        """The rows, counted as `delta` has them."""
        return self.rows if self.rows.order is None else replace(self.rows, first=0, order=None)

    def delta(self, device: str = "cpu") -> "Gralora | Lora":
        """The delta on `device`, factors in float32 (float64 stays). Where it lies on disk in
        another order it is that permutation of the exact LoRA: a permutation breaks the blocks,
        not the rank.

        Raises:
            InvalidAdapterError, UnsupportedError: as `Adapter.delta`.
        """
        from gralora_convert.delta import permute_rows, to_device

        delta, order = self.adapter.delta(self.module), self.rows.order
        return to_device(delta if order is None else permute_rows(delta, order), device)

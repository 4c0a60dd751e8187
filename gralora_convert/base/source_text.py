"""What transformers' own source text says of an architecture: read as text, never imported."""

import ast
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path

HEADS = ("lm_head", "embed_out", "output")
LINES = re.MULTILINE | re.DOTALL


@cache
def text_of(*path: str) -> str:
    """A source file of the installed transformers; '' when it is not there. Nothing is imported."""
    spec = find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        return ""
    file = Path(spec.submodule_search_locations[0]).joinpath(*path)
    return file.read_text(encoding="utf-8") if file.is_file() else ""


@cache
def modeling(model_type: str) -> str:
    """The text of transformers' modeling files of one model type; '' when there are none."""
    spec = find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        return ""
    files = (
        text_of("models", "auto", f"{name}.py") for name in ("auto_mappings", "configuration_auto")
    )
    special = r"^SPECIAL_MODEL_TYPE_TO_MODULE_NAME(?: = OrderedDict|\.update)\((.*?)^\)"
    lines = "".join(block for file in files for block in re.findall(special, file, LINES))
    names = dict(re.findall(r'"([^"]+)"(?:,|:) "([^"]+)"', lines))
    name = names.get(model_type, model_type).replace("-", "_")
    folder = Path(spec.submodule_search_locations[0]) / "models" / name
    if not re.fullmatch(r"\w+", name) or not folder.is_dir():
        return ""
    return "\n".join(f.read_text(encoding="utf-8") for f in sorted(folder.glob("modeling_*.py")))


@cache
def converted() -> frozenset[str]:
    """Model types and classes whose names or values transformers changes while it loads them."""
    return frozenset(re.findall(r'"([\w-]+)"', text_of("conversion_mapping.py")))


@dataclass(frozen=True)
class SourceText:
    """Facts on the model of a config, of which `types` are the model types: its own first, None
    when it says none, then those of the configs within it."""

    types: tuple[str | None, ...]

    @cached_property
    def text(self) -> str:
        """The text of the modeling files, '' when transformers has none for the model."""
        own = self.types[0] if self.types else None
        if not own or not modeling(own):
            return ""
        return "\n".join(modeling(name) for name in self.types if name)

    @cached_property
    def _identifiers(self) -> frozenset[str]:
        return frozenset({"weight", "bias", *re.findall(r"\w+", self.text)})

    def names(self, word: str) -> bool:
        """Whether a part of a tensor's name occurs in the text, or may be made of it: a number."""
        return not self.text or word.isdecimal() or word in self._identifiers

    @cached_property
    def prefixes(self) -> tuple[str, ...]:
        """The architecture's own `base_model_prefix`."""
        text = modeling(self.types[0]) if self.types and self.types[0] else ""
        found = re.findall(r"^    base_model_prefix = \"(\w+)\"", text, re.MULTILINE)
        return tuple(dict.fromkeys(found))

    def parts(self, class_name: str) -> tuple[str, ...]:
        """The names that a class of the model goes by where another class holds it: those that it
        is assigned to, and the prefix that it has for itself."""
        name = re.escape(class_name)
        body = re.search(rf"^class {name}\(.*?\n(?=\S|\Z)", self.text, LINES)
        if body is None:
            return ()
        own = re.findall(r"^    base_model_prefix = \"(\w+)\"", body[0], re.MULTILINE)
        called = rf"^        self\.(\w+)(?:: [^=\n]+)? = {name}(?:\._from_config)?\("
        return tuple(dict.fromkeys((*re.findall(called, self.text, re.MULTILINE), *own)))

    @cached_property
    def is_converted(self) -> bool:
        """Whether names in memory may differ from those on disk by more than a prefix."""
        classes = set(re.findall(r"^class (\w+)\(", self.text, re.MULTILINE))
        return not converted().isdisjoint({*self.types, *classes})

    @cached_property
    def _tie_patterns(self) -> tuple[re.Pattern[str], ...]:
        """Patterns of the parameters that may be one and the same with others."""
        any_may_be = (re.compile(""),)
        if not self.text or "_tied_weights_keys[" in self.text:  # not known, or made while built
            return any_may_be
        words: set[str] = set()
        for block in re.findall(r"_tied_weights_keys\b[^=\n]*=\s*(\{.*?\})", self.text, re.DOTALL):
            try:
                pairs = ast.literal_eval(block)
            except (ValueError, SyntaxError):  # made of the config, likewise
                return any_may_be
            for pair in pairs.items():
                words.update(word.removeprefix("^") for word in pair)
        return tuple(re.compile(word) for word in sorted(words))

    def may_be_tied(self, parameter: str) -> bool:
        return any(pattern.search(parameter) for pattern in self._tie_patterns)

    @property
    def tie_flag_means_more(self) -> bool:
        """Whether the forward pass reads the flag too (T5 scales the decoder's output by it), so
        that only the presence of a tensor may untie it."""
        pattern = r"if (not )?self\.config\.(tie_word_embeddings|scale_decoder_outputs):"
        return re.search(pattern, self.text) is not None

    @cached_property
    def uncalled(self) -> frozenset[tuple[str, str]]:
        """(class, layer) of linear layers whose weight the class uses while it never calls them."""
        found = set()
        for name, body in re.findall(r"^class (\w+)\((.*?)(?=^\S|\Z)", self.text, LINES):
            if ".weight" not in body:
                continue
            usual = re.sub(r"if hasattr\(self\.config, \"_is_quantized\"\):\n.*\n", "", body)
            for layer in re.findall(r"^        self\.(\w+) = (?:nn\.Linear|Conv1D)\(", body, LINES):
                called = rf"self\.{layer}(?![.\w])(?! =)"
                if f"self.{layer}.weight" in usual and not re.search(called, usual):
                    found.add((name, layer))
        return frozenset(found)

    @property
    def may_hold_conv1d(self) -> bool:
        """Whether the architecture uses Conv1D, or is not known."""
        return not self.text or "Conv1D" in self.text

    @property
    def has_encoder_class(self) -> bool:
        """Whether there is a class of the encoder alone, as T5EncoderModel."""
        return re.search(r"^class \w+EncoderModel\(", self.text, re.MULTILINE) is not None

    @property
    def keeps_lists(self) -> bool:
        """Whether modules may stand in plain lists, too, where nobody replaces them."""
        return "add_module(" in self.text

    def is_head_only(
        self,
        task_type: str | None,
        prefix: str,
        bare: Sequence[str],
        *,
        pooled: bool,
        given: Collection[str],
    ) -> bool:
        """Whether the class of a task is its bare model, of the class `bare`, under `prefix`, and
        layers that `given` holds. `pooled`: the bare model on disk has a pooling layer."""
        ending = {"SEQ_CLS": "SequenceClassification", "TOKEN_CLS": "TokenClassification"}
        wanted = f"For{ending.get(task_type or '', '?')}("
        bodies = re.findall(rf"^class \w+{re.escape(wanted)}.*?\n(?=\S|\Z)", self.text, LINES)
        if len(bodies) != 1 or not prefix:
            return False
        assigned = dict(re.findall(r"^        self\.(\w+)[^=\n]*= (.*)$", bodies[0], re.MULTILINE))
        inner = assigned.pop(prefix, "")
        if not (pooled or "add_pooling_layer=False" in inner):
            return False
        return [inner.partition("(")[0]] == list(bare) and all(
            re.fullmatch(r"config(\.\w+)?", value) or value.startswith("nn.Dropout(")
            or _is_given(layer, value, given)
            for layer, value in assigned.items()
        )  # fmt: skip


def _is_given(layer: str, value: str, given: Collection[str]) -> bool:
    """Whether `given` has all parameters of a layer that is assigned `value` in the source text; a
    linear layer has a bias unless the text says otherwise."""
    if value.startswith("nn.Linear(") and "bias=" not in value:
        return {f"{layer}.weight", f"{layer}.bias"} <= set(given)
    return any(parameter.startswith(f"{layer}.") for parameter in given)

"""Every code of a finding, with what it means and what to do: the source of docs/findings.md.

A code is a stable word: scripts may rely on it. A new check brings its row here; a test compares
the table with the codes that the package can emit.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

__all__ = [
    "CODES",
    "EXIT_STATUS",
    "REFUSALS",
    "Meaning",
    "page",
]


class Meaning(NamedTuple):
    """The severities that a code may have, what it says, and what to do about it."""

    severity: str
    meaning: str
    remedy: str


E, W, N = "error", "warning", "note"
_RESAVE = "Save it again with `PeftModel.save_pretrained`."
_COPY = "Copy or download the file again."
_OTHER_BASE = "Name the base that it was trained on with `--base`."
_FIX = "Correct it from the settings of the training run."

SECTIONS: Mapping[str, Mapping[str, Meaning]] = {
    "The folder and its files": {
        "config-missing": Meaning(E, "There is no `adapter_config.json`.",
                                  "Name the adapter's folder; PEFT saves a named adapter in a "
                                  "sub-folder."),
        "config-unreadable": Meaning(E, "`adapter_config.json` cannot be read.", _COPY),
        "config-not-json": Meaning(E, "It is not JSON (cut off, another encoding).", _COPY),
        "config-not-object": Meaning(E, "It holds a list or a value, not an object.", _FIX),
        "config-duplicate-key": Meaning(E, "A key stands twice; readers disagree which counts.",
                                        "Keep the one it was trained with."),
        "config-bom": Meaning(E, "It starts with a byte order mark, which PEFT refuses.",
                              "Save it as plain UTF-8."),
        "weights-missing": Meaning(E, "There is no `adapter_model.safetensors` or `.bin`.",
                                   "Name the adapter's folder, or download all of it."),
        "weights-sharded": Meaning(E, "The weights are in shards, which PEFT does not read.",
                                   "Save all tensors in one file."),
        "weights-ambiguous": Meaning(W, "Both a `.safetensors` and a `.bin` file are there.",
                                     "Remove the one that is not meant; the first is read."),
        "weights-unreadable": Meaning(E, "The weights are damaged or cut off.", _COPY),
        "weights-lfs-pointer": Meaning(E, "A Git LFS pointer stands in place of the weights.",
                                       "Run `git lfs pull`."),
        "weights-unsafe-pickle": Meaning(E, "The pickle wants to run code.",
                                         "Do not load it. Ask for safetensors."),
        "weights-nested": Meaning(E, "The pickle holds tensors inside other dictionaries.",
                                  "Save the dictionary of tensors alone."),
        "weights-empty": Meaning(E, "The weights file holds no tensor.",
                                 "Saved from a rank without parameters? Gather them first."),
        "weights-pickle": Meaning(N, "The weights are a pickle.",
                                  "Nothing; `convert` writes safetensors."),
        "metadata-missing": Meaning(N, "The safetensors file has no metadata.", "Nothing."),
        "metadata-format": Meaning(N, "Its metadata name another format than `pt`.", "Nothing."),
        "adapters-below": Meaning(N, "Sub-folders hold adapters, too (`inspect`).",
                                  "Name the sub-folder that is meant."),
    },
    "The config": {
        "peft-type-missing": Meaning(E, "`peft_type` is missing.", "Add it: GRALORA or LORA."),
        "peft-type-unknown": Meaning(E, "`peft_type` is no method of PEFT.", _FIX),
        "peft-type-unsupported": Meaning(E, "It is an adapter of another method.",
                                         "Merge it with PEFT."),
        "peft-type-mismatch": Meaning(E, "`peft_type` is LORA, the tensors are GraLoRA's.",
                                      "Set it to GRALORA."),
        "peft-version-missing": Meaning(N, "The release of PEFT is not recorded.", "Nothing."),
        "peft-version-unverified": Meaning(W, "A release that this tool was not measured against.",
                                           "Check the merge with `verify`."),
        "fork-config": Meaning(f"{E}, {N}", "Fields of the original authors' code. Note: read as "
                               "such. Error: mixed with those of PEFT.",
                               "Keep the alpha that it was trained with."),
        "config-key-missing": Meaning(W, "A field is missing; PEFT's default fits the tensors.",
                                      "Add it."),
        "config-key-unknown": Meaning(W, "A field that GraLoRA does not have.", "Nothing; kept."),
        "config-key-unsupported": Meaning(f"{E}, {W}", "A field of another method. Error: it would "
                                          "change the mathematics. Warning: it is empty.",
                                          "Remove it if PEFT's GraLoRA ignored it in training."),
        "config-value-type": Meaning(E, "A field has a value of the wrong type.", _FIX),
        "config-value-range": Meaning(E, "A number is out of its range.", _FIX),
        "config-non-finite": Meaning(E, "A number is NaN or infinite.", _FIX),
        "rank-not-divisible": Meaning(E, "`gralora_k` does not divide `r`.", _FIX),
        "alpha-missing": Meaning(E, "`alpha` is missing; the tensors do not tell it.", _FIX),
        "alpha-zero": Meaning(W, "`alpha` is 0: the adapter has no effect.", _FIX),
        "dropout-total": Meaning(N, "A dropout of 1 lets nothing pass in training.", "Nothing."),
        "bias-mode-unknown": Meaning(E, "`bias` is no mode of PEFT.",
                                     "Set none, all or gralora_only."),
        "bias-mode-alias": Meaning(W, "`bias` is the word of another method; PEFT accepts it.",
                                   "Nothing."),
        "task-type-unknown": Meaning(E, "`task_type` is none of PEFT's.", _FIX),
        "init-weights-false": Meaning(N, "PEFT starts missing tensors at random values.",
                                      "Nothing: a missing tensor is an error of its own."),
        "lora-feature-unsupported": Meaning(W, "A LoRA whose update is more than scaling * B @ A.",
                                            "Convert it with --base, or merge it with PEFT."),
        "lora-sampler-ignored": Meaning(W, "Tensors used in training only are left out.",
                                        "Nothing."),
    },
    "Target modules": {
        "target-modules-null": Meaning(E, "`target_modules` is null.",
                                       "Name the modules that were trained."),
        "target-regex-invalid": Meaning(E, "A pattern is no regular expression, or takes too "
                                        "long.", _FIX),
        "target-matches-nothing": Meaning(E, "`target_modules` selects none of the modules here.",
                                          _FIX),
        "target-name-unmatched": Meaning(N, "A name in the list selects nothing in the base.",
                                         "Nothing."),
        "target-duplicate": Meaning(N, "A name stands twice in the list.", "Nothing."),
        "layers-to-transform-ignored": Meaning(N, "It has no effect beside a regular expression.",
                                               "Nothing."),
        "target-rule-changed": Meaning(W, "Releases of PEFT select different layers here; the "
                                       "tensors in the file decide.", "Nothing."),
        "target-without-tensors": Meaning(f"{E}, {W}", "A module is selected, but has no tensors. "
                                          "Warning: guessed without a base.",
                                          "Complete the adapter, or " + _OTHER_BASE.lower()),
        "tensors-without-target": Meaning(E, "A module has tensors, but is not selected; PEFT "
                                          "would ignore them.", "Correct `target_modules`."),
    },
    "Keys": {
        "key-prefix-missing": Meaning(E, "Keys lack `base_model.model.`.", _RESAVE),
        "key-wrapper-prefix": Meaning(f"{E}, {W}", "Keys hold the name of a wrapper (compile, "
                                      "DDP, FSDP).",
                                      "Unwrap the model, then save it."),
        "key-adapter-name": Meaning(f"{E}, {W}", "Keys hold the adapter's name; PEFT reads only "
                                    "`default`.", _RESAVE),
        "key-leaf-unknown": Meaning(E, "A key does not end as a tensor of GraLoRA does.", _RESAVE),
        "key-foreign-method": Meaning(E, "A key belongs to another method.",
                                      "Correct `peft_type`, or remove the tensors."),
        "key-duplicate-role": Meaning(E, "Two keys mean the same tensor.", "Keep one of them."),
        "key-modules-to-save-infix": Meaning(E, "A key holds the wrapper of a saved module.",
                                             _RESAVE),
        "key-map-unmatched": Meaning(W, "A `--key-map` names no module of the adapter.",
                                     "Check its spelling."),
        "tensor-unclaimed": Meaning(E, "A tensor that belongs to nothing in the config.",
                                    "Name its module in `modules_to_save`, or remove it."),
        "base-weight-in-adapter": Meaning(E, "A base weight is in the adapter.",
                                          "Remove it; PEFT would overwrite the base."),
    },
    "Tensors": {
        "missing-tensor": Meaning(E, "A module lacks one of its factors; PEFT would fill it with "
                                  "initial values.", "Take a complete checkpoint."),
        "tensor-shape": Meaning(E, "Factors have shapes that do not go together.",
                                "Transposed, swapped or cut? " + _RESAVE),
        "rank-mismatch": Meaning(E, "The tensors have another r than the config.", _FIX),
        "k-mismatch": Meaning(E, "The tensors have another k than the config.", _FIX),
        "hybrid-rank-mismatch": Meaning(E, "The general part does not fit `hybrid_r`.", _FIX),
        "tensor-empty": Meaning(E, "A tensor has no elements.",
                                "Gather the parameters of a sharded run before saving."),
        "tensor-dtype": Meaning(E, "A factor is not of a floating dtype.", _RESAVE),
        "tensor-dtype-lossy": Meaning(W, "A factor has 8 bits, too few for it.",
                                      "Save 16 or 32 bits."),
        "tensor-dtype-mixed": Meaning(N, "Factors have several dtypes.", "Nothing."),
        "tensor-non-finite": Meaning(E, "A tensor holds NaN or infinity.",
                                     "Training diverged: use an earlier checkpoint."),
        "zero-factor": Meaning(W, "A factor is all zero: its part has no effect.",
                               "Is the adapter trained?"),
    },
    "Biases, saved modules, embeddings": {
        "bias-missing": Meaning(f"{E}, {W}", "Biases were trained, but are not in the file (PEFT "
                                "before 0.21 loses them).", "Train again with PEFT 0.21 or newer."),
        "bias-unexpected": Meaning(E, "A bias is in the file, but `bias` is none (or the layer has "
                                   "none).", "Correct `bias`, or remove the tensor."),
        "bias-saved-twice": Meaning(N, "A second copy of a bias is not used.", "Nothing."),
        "modules-to-save-missing": Meaning(E, "A saved module of the base has no tensors here.",
                                           "Take a complete checkpoint."),
        "modules-to-save-shape": Meaning(E, "A saved tensor does not fit the base.", _OTHER_BASE),
        "modules-to-save-unmatched": Meaning(N, "An entry names nothing in the base or the file.",
                                             "Nothing; PEFT adds some by task."),
        "config-other-model": Meaning(E, "The `config.json` beside the adapter describes other "
                                      "tensors than the base has.",
                                      "Another base, or save resized embeddings, too."),
        "head-class-unbuildable": Meaning(E, "transformers cannot build the class of the trained "
                                          "head from the base's config.", "Mend the config."),
        "head-incomplete": Meaning(E, "Parts of a new head were never saved and are lost.",
                                   "Train again with the head in `modules_to_save`."),
        "embeddings-saved": Meaning(N, "Whole embeddings are in the adapter.", "Nothing."),
        "embeddings-differ-from-base": Meaning(W, "They differ from the base's, though they were "
                                               "not trained; they are used.", _OTHER_BASE),
        "embedding-size-mismatch": Meaning(E, "Only some of the embeddings were resized.",
                                           "Save input and output embeddings."),
    },
    "Receipts": {
        "receipt-mismatch": Meaning(f"{E}, {W}", "What lies here is not what the receipt states: "
                                    "an error for merged weights, else a warning.",
                                    "Make it again; where it was changed on purpose, remove the "
                                    "receipt."),
        "receipt-base-mismatch": Meaning(E, "The merge was made from another base.", _OTHER_BASE),
        "receipt-unreadable": Meaning(f"{E}, {W}", "`gralora_convert.json` is no receipt of this "
                                      "tool.", "Remove it, or make the output again."),
        "receipt-without-digests": Meaning(N, "The receipt states no sha256 of the files.",
                                           "Merge with `--digests`, or use `verify`."),
    },
    "The fit to the base": {
        "base-not-checked": Meaning(N, "The base is not at hand; the adapter was checked alone.",
                                    "Give `--base`."),
        "base-name-mismatch": Meaning(W, "The base has another name than the one trained on.",
                                      _OTHER_BASE),
        "base-prefix": Meaning(N, "The base names its tensors with or without its prefix.",
                               "Nothing."),
        "base-quantised": Meaning(E, "The base is quantised.",
                                  "Merge into the original model, then quantise."),
        "module-not-in-base": Meaning(E, "A module is not in the base.",
                                      _OTHER_BASE + " Or rename with `--key-map FROM=TO`."),
        "part-ambiguous": Meaning(E, "Several parts of the base fit the adapter (the towers of a "
                                  "CLIP), and it does not name the class that was trained.",
                                  "Name the part with `--key-map FROM=TO`."),
        "base-shape-mismatch": Meaning(E, "A module has another shape in the base.", _OTHER_BASE),
        "k-not-dividing": Meaning(E, "`gralora_k` does not divide a layer of the base.",
                                  _OTHER_BASE),
        "module-kind-unsupported": Meaning(E, "A module is no linear layer (embedding, "
                                           "convolution, experts).", "Remove its tensors."),
        "target-unsupported": Meaning(E, "A live layer is neither nn.Linear nor Conv1D.",
                                      "Attach to the model that was trained."),
        "forward-ignores-adapter": Meaning(E, "The model reads this layer's weight, or keeps the "
                                           "layer in a plain list, and never calls it by name: its "
                                           "trained adapter had no effect.",
                                           "Remove its tensors."),
        "attention-out-proj": Meaning(E, "nn.MultiheadAttention never calls this layer.",
                                      "Remove its tensors: they had no effect in training."),
        "fan-in-fan-out-mismatch": Meaning(W, "The flag contradicts the layers; they decide.",
                                           "Nothing."),
        "fan-in-fan-out-inferred": Meaning(N, "A square weight is taken as stored like the "
                                           "others.", "Nothing."),
        "fan-in-fan-out-ambiguous": Meaning(E, "Whether a square weight is stored transposed "
                                            "cannot be told.",
                                            "Put the model's config.json beside its weights."),
        "tied-target": Meaning(N, "A shared weight is adapted; the output unties it.", "Nothing."),
        "shared-parameter": Meaning(E, "One weight would need two values.",
                                    "Serve the adapter unmerged."),
        "shared-module": Meaning(E, "Two modules of the adapter are one layer of the model.",
                                 "Attach one of the two."),
        "already-replaced": Meaning(E, "Another attached adapter replaces the tensor.",
                                    "Detach it first."),
    },
}  # fmt: skip
CODES: Mapping[str, Meaning] = {code: m for rows in SECTIONS.values() for code, m in rows.items()}

EXIT_STATUS: Mapping[int, str] = {
    0: "done, or yes",
    1: "the answer is no: the adapter is invalid, the two are not the same function",
    2: "refused or misused: bad usage, an input that cannot be read, an output that exists, no "
    "space; one line says where, what was found, what was needed, what to do",
    70: "a bug: the traceback is printed with a request to report it",
    130: "interrupted: the output is what it was before",
}
REFUSALS: Mapping[str, str] = {
    "usage": "an option or argument that the command does not have, or a value that it cannot take",
    "misuse": "arguments that do not go together",
    "unreadable": "a file that is missing, or is not what it claims to be",
    "unsupported": "well formed, but not handled (GGUF, a quantised base, a LoRA with DoRA)",
    "invalid-adapter": "the adapter has errors; `validate` lists them",
    "inexact": "the shape asked for cannot hold the update, and `--allow-inexact` is not given",
    "output": "the output exists, cannot be written, or does not fit on the disk",
    "input-changed": "an input changed while it was read",
    "check-failed": "what was written failed its own check and was not published",
    "memory": "there is not enough memory, of the machine or of the device",
    "system": "the operating system refused a file",
}


def page() -> str:
    """docs/findings.md."""
    lines = [
        "# Exit status, refusals and findings",
        "",
        "<!-- written by `python -m tests.pages` from gralora_convert/verbs/codes.py -->",
        "",
        "## Exit status",
        "",
        *_table(("status", "meaning"), [(str(s), text) for s, text in EXIT_STATUS.items()]),
        "",
        "## Refusals",
        "",
        'With status 2 and `--json`, stdout holds `{"error": {"kind", "message", "where", '
        '"hint"}}`; `kind` is one of these.',
        "",
        *_table(("kind", "meaning"), [(f"`{kind}`", text) for kind, text in REFUSALS.items()]),
        "",
        "## Findings",
        "",
        "`validate` prints one finding per line: `severity[code]: where: what. What to do.` Codes "
        "are stable. An error makes the status 1; warnings and notes do not.",
    ]
    for title, rows in SECTIONS.items():
        listed = [(f"`{c}`", m.severity, m.meaning, m.remedy) for c, m in rows.items()]
        lines += ["", f"### {title}", ""]
        lines += _table(("code", "severity", "meaning", "what to do"), listed)
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]

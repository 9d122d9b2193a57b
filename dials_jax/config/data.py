"""The settings of the data that a model is trained and evaluated on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dials_jax.config.typed import Place, Seed, Typed
from dials_jax.errors import require


def _require_share(random_length_prob: float) -> None:
    require(
        0 <= random_length_prob <= 1,
        f"random_length_prob={random_length_prob} must lie in [0, 1]; 0.01 is one in a hundred",
    )


@dataclass(frozen=True, kw_only=True)
class TextData(Typed):
    """Documents packed one after the other into rows of `length` tokens."""

    kind: Literal["text"] = "text"
    paths: tuple[Place, ...] = ()  # .txt, .jsonl, .jsonl.gz, .jsonl.xz files, or folders of them
    # A tokenizer.json, or a folder with the files of one (docs/data.md); "" is the model's.
    tokenizer: Place = ""
    length: int = 1024
    prompt_length: int = 0  # tokens at the front that are never masked
    # Probability that a batch is cut to a random length, as in LLaDA (appendix B.1).
    random_length_prob: float = 0.01
    cache: Place = ".cache/dials_jax"  # the folder of the packed rows

    def __post_init__(self):
        super().__post_init__()
        _require_share(self.random_length_prob)


@dataclass(frozen=True, kw_only=True)
class CorpusData(Typed):
    """A large corpus that `prepare.py` packs once into rows of `length` tokens, in `folder`.

    It comes from a Hugging Face data set or from files. Training reads only `folder`.
    """

    kind: Literal["corpus"] = "corpus"
    folder: Place  # of the rows; all hosts of a pod have to read it
    dataset: Place = ""  # "Skylion007/openwebtext", or a folder; see docs/data.md
    dataset_config: str = ""
    dataset_split: str = "train"
    paths: tuple[Place, ...] = ()  # or .txt, .jsonl, .jsonl.gz, .jsonl.xz files, or folders of them
    text_field: str = "text"
    skip_bad_files: bool = False  # leave out files that cannot be read, instead of stopping
    tokenizer: Place = ""  # as in TextData; if the model has none either, that of `folder`
    length: int = 1024
    packing: Literal["mdlm", "stream"] = "mdlm"  # see dials_jax/data/packing.py
    num_validation: int = 100_000  # the last documents, this many, are the split "validation"
    split: Literal["train", "validation"] = "train"  # the split that is read
    reader: Literal["auto", "grain", "numpy"] = "auto"  # the same rows in the same order
    prompt_length: int = 0  # tokens at the front that are never masked
    random_length_prob: float = 0.0  # as in TextData

    def __post_init__(self):
        super().__post_init__()
        require(self.length > 2, f"length={self.length} must be more than 2 tokens")
        require(
            0 <= self.prompt_length < self.length,
            f"prompt_length={self.prompt_length} must lie in [0, length={self.length})",
        )
        require(self.num_validation >= 0, f"num_validation={self.num_validation} is negative")
        _require_share(self.random_length_prob)


@dataclass(frozen=True, kw_only=True)
class TaskData(Typed):
    """Prompts and answers from records. `{name}` and `{name.inner}` in a template are fields.

    The answer is `answer`, or of multiple choice the right one of `choices` or `choice_list`. A
    pair is too long if its prompt or one of its answers is, in training and for every metric of
    an evaluation; `too_long` decides what happens then. In training every answer ends with the end
    of text, which counts. In an evaluation with `extract`, only the extracted answer counts.
    """

    kind: Literal["task"] = "task"
    # .jsonl, .jsonl.gz, .jsonl.xz, .parquet files, or folders of them; or "FOLDER:SPLIT" for a
    # folder that tensorflow-datasets has prepared
    paths: tuple[Place, ...] = ()
    preparation: Literal["none", "hellaswag", "mmlu"] = (
        "none"  # adds fields; see data/preparations.py
    )
    tokenizer: Place = ""  # as in TextData
    prompt: str = "{prompt}"
    answer: str = "{answer}"
    choices: tuple[str, ...] = ()  # templates, one per choice ("{sol1}", "{sol2}")
    choice_list: str = ""  # or one field that holds a list ("choices.text")
    label: str = "label"  # field with the index or the name of the right choice
    label_names: str = ""  # field that lists the choices' names ("choices.label")
    # Between prompt and answer. None: a space where an entry of choice_list would touch the prompt;
    # templates have their own.
    target_delimiter: str | None = None
    # A file and how many of its records stand before every prompt, with their answers.
    few_shot: tuple[Place, int] | None = None
    few_shot_by: str = ""  # only records with the same value of this field ("subject")
    few_shot_delimiter: str = "\n\n"  # after each of them
    description: str = ""  # template of what stands before them
    prompt_length: int = 512  # longest prompt in tokens; prompts are padded on the left
    answer_length: int = 256  # longest answer in tokens, in training with its end of text
    pad_answer: bool = True  # pad the answer with end of text and train on it (LLaDA SFT)
    too_long: Literal["error", "drop"] = "error"  # "drop": leave them out; results state how many

    def __post_init__(self):
        super().__post_init__()
        require(
            len(self.choices) != 1 and len(set(self.choices)) == len(self.choices),
            f"choices={self.choices} must be several, and all different",
        )
        require(
            not (self.choices and self.choice_list),
            "give either choices= (templates) or choice_list= (a field), not both",
        )
        require(
            self.few_shot is None or self.few_shot[1] > 0,
            f"few_shot={self.few_shot} must name a file and a number of examples; None is for none",
        )
        require(
            not self.few_shot_by or self.few_shot is not None,
            f"few_shot_by={self.few_shot_by!r} chooses among examples; give few_shot, too",
        )


@dataclass(frozen=True, kw_only=True)
class ArithmeticData(Typed):
    """The procedural task of the demo: reversals, maxima, sorted digits; sums are harder."""

    kind: Literal["arithmetic"] = "arithmetic"
    operations: tuple[str, ...] = ("reverse", "max", "sort")
    digits: int = 2
    num_items: int = 20_000  # distinct training items
    split_seed: Seed = 0  # decides which items are held out


Data = TextData | CorpusData | TaskData | ArithmeticData

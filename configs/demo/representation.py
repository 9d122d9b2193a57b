"""The demo's model from within: cosines of layers and of neighbouring tokens, norms, and what
changes near new tokens, on held-out questions (docs/representation.md).

python eval.py --config configs/demo/representation.py --workdir runs/demo/representation

Expected: in half a minute a page of figures. The late layers change their input least, so the claim
that early layers are redundant is not supported in a model of six layers on this task.
"""

from dials_jax.config import ArithmeticData, RepresentationStudy


def get_config() -> RepresentationStudy:
    return RepresentationStudy(
        models=(("demo", "runs/demo/model"),),
        data=ArithmeticData(),
        num_prompts=256,
        gen_length=5,  # tokens of an answer
        batch_size=64,
        dtype="float32",
    )

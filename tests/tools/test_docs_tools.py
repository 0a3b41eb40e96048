"""The tools that write pages of the docs from trials, without the trials."""

from tools.docs import teachers


def test_teachers_are_listed_by_what_vllm_makes_of_them() -> None:
    page = teachers.as_markdown(
        {
            "transformers": {"llama": 4e-7, "bloom": 1e-6, "rwkv": 2e-7},
            "vllm": {"llama": 7e-7, "bloom": 2e-4, "rwkv": None},
        }
    )
    assert page.splitlines() == [
        "- **vLLM answers as transformers**: the other 1 of the students' list",
        "- **vLLM answers otherwise**, by so many nats (1): `bloom` 2e-04",
        "- **vLLM refuses** (1): `rwkv`",
        "",
        "`engine: transformers` answers all of them, with a difference of 1e-06 at most.",
    ]

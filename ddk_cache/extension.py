"""What may change between two builds of one cache, and what may not."""

from typing import Any

from ddk_cache import layout


def manifest_differences(there: layout.Manifest, wanted: layout.Manifest) -> list[str]:
    """What keeps a cache from being extended to ``wanted``, as "key: in the cache -> wanted"."""
    exempt = {"domains", "teachers", "version"}
    before = there.model_dump(exclude=exempt) | _teacher_keys("teacher", there.teachers[0])
    after = wanted.model_dump(exclude=exempt) | _teacher_keys("teacher", wanted.teachers[0])
    for domain in there.domains:
        match = next((other for other in wanted.domains if other.name == domain.name), None)
        key = f"domains.{domain.name}"
        before[key], after[key] = domain.source, match and match.source
        if match is None:
            continue
        if domain.teacher or match.teacher:
            before |= _teacher_keys(f"{key}.teacher", there.teacher_of(domain.name))
            after |= _teacher_keys(f"{key}.teacher", wanted.teacher_of(domain.name))
        if _limit(match.max_tokens) < _limit(domain.max_tokens):
            before[f"{key}.max_tokens"], after[f"{key}.max_tokens"] = domain.max_tokens, match.max_tokens
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in before | after
        if before.get(key) != after.get(key)
    ]


def _teacher_keys(prefix: str, teacher: layout.TeacherInfo) -> dict[str, Any]:
    """What of a teacher decides the numbers, key by key."""
    found = {
        f"{prefix}.{key}": value for key, value in teacher if key not in ("engine_version", "engine_args")
    }
    return found | {f"{prefix}.engine_args.{key}": value for key, value in teacher.engine_args.items()}


def _limit(max_tokens: int | None) -> float:
    return float("inf") if max_tokens is None else max_tokens

"""Triton's interpreter in a fraction of its time: what it looks up at each call of a function, it looks up once.

At each launch, and again at each call of a device function within one, it walks through all of `triton.language` for
what to replace there. Within a launch that has been done, and what there is to replace does not change.
"""

import inspect

import triton.language as tl
from triton.runtime import interpreter


def is_replaced(language) -> bool:
    return not tl.core.is_builtin(language.load)


def remember() -> None:
    """Replaces the interpreter's two searches, if this Triton has them."""
    if not (hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_patch_builtin")):
        return
    patch_lang, languages, builtins = interpreter._patch_lang, {}, {}

    def patch_lang_once(function):
        if function not in languages:
            visible = list(map(id, function.__globals__.values()))
            languages[function] = [x for x in (tl, tl.core) if id(x) in visible]
        if languages[function] and all(map(is_replaced, languages[function])):
            return interpreter._LangPatchScope()
        return patch_lang(function)

    def patch_builtin(package, builder, scope):
        if package not in builtins:
            builtins[package] = [name for name, x in inspect.getmembers(package) if tl.core.is_builtin(x)]
        for name in builtins[package]:
            member = getattr(package, name)
            if tl.core.is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_lang, interpreter._patch_builtin = patch_lang_once, patch_builtin

"""What crosses from Python to the native step: the structures of model.h, field by field, and its functions."""

from __future__ import annotations

import ctypes

POINTER = ctypes.c_void_p
LONG = ctypes.c_int64


class LayerView(ctypes.Structure):
    """Weights of one layer, by address; null where the family has none."""

    _fields_ = [
        *[(name, POINTER) for name in ("query", "key", "value", "output", "gate", "up", "down")],
        *[(f"{name}_bias", POINTER) for name in ("query", "key", "value", "output", "gate", "up", "down")],
        *[(name, POINTER) for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm")],
        ("window", LONG),
    ]


class ModelView(ctypes.Structure):
    """Sizes, constants and weights of a model."""

    _fields_ = [
        *[
            (name, LONG)
            for name in (
                "layers",
                "hidden",
                "heads",
                "kv_heads",
                "head_dim",
                "feed_forward",
                "vocabulary",
                "rotary_dim",
                "is_bf16",
                "norm_adds_one",
                "activation",
            )
        ],
        *[(name, ctypes.c_float) for name in ("norm_epsilon", "attention_scale", "embedding_scale")],
        *[(name, POINTER) for name in ("cosines", "sines", "embedding", "head", "head_bias", "final_norm")],
        ("layer", ctypes.POINTER(LayerView)),
    ]


class CacheView(ctypes.Structure):
    """Addresses of a cache, and of the cache whose prefix it shares."""

    _fields_ = [
        ("keys", ctypes.POINTER(POINTER)),
        ("values", ctypes.POINTER(POINTER)),
        ("capacity", LONG),
        ("prefix_keys", ctypes.POINTER(POINTER)),
        ("prefix_values", ctypes.POINTER(POINTER)),
        ("prefix_capacity", LONG),
        ("prefix_lengths", ctypes.POINTER(LONG)),
        ("prefix_rows", ctypes.POINTER(LONG)),
        ("own_rows", ctypes.POINTER(LONG)),
    ]


class BlocksView(ctypes.Structure):
    """Where a pass leaves the attention among a step's own tokens."""

    _fields_ = [("out", POINTER), ("since", ctypes.POINTER(LONG)), ("first_layer", LONG), ("span", LONG)]


def declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the argument types of its functions, so that ctypes checks and converts."""
    model, view, longs = ctypes.POINTER(ModelView), ctypes.POINTER(CacheView), ctypes.POINTER(LONG)
    for name, arguments in {
        "telltale_has_threads": [],
        "telltale_run": [
            model,
            view,
            LONG,
            LONG,
            longs,
            LONG,
            LONG,
            POINTER,
            POINTER,
            ctypes.POINTER(BlocksView),
            LONG,
        ],
        "telltale_head": [model, POINTER, LONG, POINTER, POINTER, LONG],
        "telltale_greedy_steps": [model, view, LONG, longs, longs, LONG, LONG, longs, LONG, longs, POINTER, LONG],
        "telltale_greedy_after": [model, view, LONG, LONG, longs, longs, POINTER, LONG, longs, LONG],
    }.items():
        function = getattr(library, name)
        function.restype, function.argtypes = LONG, arguments
    return library

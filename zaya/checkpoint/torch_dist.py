"""The sharded format of torch.distributed.checkpoint (DCP), as Megatron-core's `torch_dist` keeps it: a safe reader, a streaming writer.

Off the batch's path: tools.export_megatron and tools.import_megatron stand on it. Knows no model, no names and no process group.

A directory of it holds
    .metadata       a pickle: every tensor's dtype, shape and chunks, and in which file at which bytes each chunk lies
    __R_N.distcp    the chunks, each a file of torch.save inside the file; R is the process that wrote it
    common.pt       a file of torch.save: what is not sharded (arguments, iteration)
    metadata.json   which backend wrote the other three; Megatron takes a directory without it for something else

The pickles are foreign, so nothing they name is imported or called: every class of the allow-list is replaced by an inert record, every
other name is an error. A chunk's numbers are read by torch.load(weights_only=True) from its own byte range. File names are plain names
in this directory. The format holds no hashes: a changed bit inside a chunk's numbers is not noticed.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pickle
import re
import reprlib
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from zaya.checkpoint.directory import NewDirectory, sync_directory
from zaya.checkpoint.errors import CheckpointError, disk_errors
from zaya.checkpoint.manifest import MAX_DIMS, MAX_INT, Box, TensorEntry, check_cover
from zaya.dtypes import STORED_DTYPES, STORED_NAMES

METADATA, COMMON, CONFIG = ".metadata", "common.pt", "metadata.json"
BACKENDS = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
# 74B in 17,000 chunks, with the plans of all processes that Megatron adds, is 5 MB of .metadata (and 2 s of reading).
MAX_PICKLE_BYTES = 256 << 20
_FILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}\.distcp")  # no separator can occur: a name is never a path

_SETS = {"builtins": ("set",), "__builtin__": ("set",)}  # never looked into
# What a pickle of the format may name. DCP's own classes (torch 2.0 to 2.13), and what Megatron adds to .metadata: its processes' plans.
_METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "MetadataIndex",
        "StorageMeta", "_MEM_FORMAT_ENCODING"),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.distributed.checkpoint.planner": ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
    "torch.distributed._shard.sharded_tensor.metadata": ("TensorProperties", "MEM_FORMAT_ENCODING"),  # before torch 2.3
    "megatron.core.dist_checkpointing.strategies.torch": ("MCoreMetadata", "MCoreSavePlan"),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath",),
    **_SETS,
}
# common.pt: arguments as Megatron's argparse leaves them, and tensors of its RNG and scheduler state, of which none is ever read.
# The Megatron names are those of megatron.core.safe_globals and of megatron.core.transformer.enums (0.16.1).
_COMMON_CLASSES = {
    **_SETS,
    "argparse": ("Namespace",),
    "types": ("SimpleNamespace",),
    "pathlib": ("PosixPath",),
    "signal": ("Signals",),
    "torch": tuple(f"{kind}Storage" for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")),
    "torch._utils": ("_rebuild_tensor_v2", "_rebuild_parameter"),
    "torch.serialization": ("_get_layout",),
    "numpy": ("ndarray", "dtype"),
    "numpy.core.multiarray": ("_reconstruct", "scalar"),
    "numpy._core.multiarray": ("_reconstruct", "scalar"),
    "_codecs": ("encode",),
    "megatron.core.enums": ("ModelType",),
    "megatron.core.optimizer.optimizer_config": ("OptimizerConfig",),
    "megatron.core.rerun_state_machine": ("RerunDiagnostic", "RerunMode", "RerunState"),
    "megatron.core.transformer.enums": ("AttnBackend", "AttnMaskType", "AttnType", "CudaGraphScope", "LayerType", "ModelType"),
}
# What is real: plain data; nothing can be attached to it, and no call makes it large (a Size is the tuple that torch gives it).
_PLAIN: dict[tuple[str, str], Any] = {
    ("torch", "Size"): lambda items: items, ("collections", "OrderedDict"): lambda: {},
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
}
# All that a damaged pickle or a damaged file of torch.save was seen to raise, beside what we raise.
_DAMAGE = (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, MemoryError,
           RuntimeError, AssertionError, struct.error, zipfile.BadZipFile)


class Record:
    """What a pickle says about one object of a foreign class: its state, and not the arguments it was made with. Runs nothing."""

    state: Any = None

    def __new__(cls, *args: Any) -> Record:
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def fields(self) -> dict[str, Any]:
        return {key: value for key, value in self.state.items() if isinstance(key, str)} if isinstance(self.state, dict) else {}


def _is_plain_key(key: object) -> bool:
    """Whether it is hashed and compared at once. A tuple of tuples that share their parts can take for ever; so can many huge numbers."""
    if type(key) is tuple:
        return len(key) <= MAX_DIMS and all(type(part) is not tuple and _is_plain_key(part) for part in key)
    return key is None or isinstance(key, (str, bytes, float, Record, torch.dtype)) or (isinstance(key, int) and -MAX_INT <= key <= MAX_INT)


def _with_plain_keys(opcode: bytes, keys: slice) -> Callable[[Any], None]:
    """The opcode that makes keys of these items of the stack (those since the last mark)."""
    load = pickle._Unpickler.dispatch[opcode[0]]

    def checked(unpickler: Any) -> None:
        if not all(map(_is_plain_key, unpickler.stack[keys])):
            raise CheckpointError("is damaged: one of its keys is a long or nested tuple, or a huge number, or no key at all")
        load(unpickler)

    return checked


def _refuse_bytearray(unpickler: Any) -> None:
    raise CheckpointError("is damaged: it holds a bytearray, for which memory would be taken before a byte of it is there")


class _Unpickler(pickle._Unpickler):
    """The pure Python one: one changed byte can make C's reserve 64 GB for its memo, this one keeps it in a dict."""

    dispatch = pickle._Unpickler.dispatch | {opcode[0]: _with_plain_keys(opcode, keys) for opcode, keys in (
        (pickle.SETITEM, slice(-2, -1)), (pickle.SETITEMS, slice(0, None, 2)), (pickle.DICT, slice(0, None, 2)),
        (pickle.ADDITEMS, slice(None)), (pickle.FROZENSET, slice(None)))} | {pickle.BYTEARRAY8[0]: _refuse_bytearray}

    def __init__(self, data: bytes, allowed: Mapping[str, tuple[str, ...]]) -> None:
        super().__init__(io.BytesIO(data))
        self._allowed = allowed
        self._classes: dict[tuple[str, str], type[Record]] = {}  # of this file alone: what it does to them stays with it

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        if name not in self._allowed.get(module, ()):
            raise CheckpointError(f"names {reprlib.repr(f'{module}.{name}')}, which has no place in this format; it was not run. "
                                  "Do not trust this checkpoint")
        return self._classes.setdefault((module, name), type(name, (Record,), {}))

    def persistent_load(self, pid: Any) -> Record:
        """The storage of a tensor in common.pt: it stays where it is."""
        return Record(pid)


def _unpickle(data: bytes, allowed: Mapping[str, tuple[str, ...]]) -> Any:
    try:
        return _Unpickler(data, allowed).load()
    except CheckpointError:
        raise
    except _DAMAGE as error:
        raise CheckpointError(f"is damaged: {reprlib.repr(str(error)) if str(error) else type(error).__name__}") from None


@dataclass(frozen=True)
class Chunk:
    """Elements [offsets, offsets + sizes) of a tensor: a file of torch.save at bytes [begin, begin + length) of `file`."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    begin: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint; its chunks cover it exactly, without overlap."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


class TorchDistReader:
    """An open directory. All that is wrong is a CheckpointError with file and tensor; a tensor is checked when it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / METADATA).is_file():
            raise CheckpointError(f"{path} is not a torch_dist checkpoint: it has no {METADATA}")
        self._check_backend()
        metadata = self._pickle(METADATA, lambda data: _unpickle(data, _METADATA_CLASSES))
        fields = metadata.fields() if isinstance(metadata, Record) else {}
        tensors, places = fields.get("state_dict_metadata"), fields.get("storage_data")
        if not isinstance(tensors, dict) or not isinstance(places, dict):
            raise CheckpointError(f"{path / METADATA} is damaged: it is not the metadata of a checkpoint")
        self._tensors = {name: entry for name, entry in tensors.items()
                         if isinstance(name, str) and type(entry).__name__ == "TensorStorageMetadata"}
        self._places: dict[tuple[str, tuple[int, ...]], object] = {}
        for index, place in places.items():
            where = index.fields() if isinstance(index, Record) else {}
            name, offset = where.get("fqn"), where.get("offset")
            if isinstance(name, str) and offset is not None:
                self._places[name, self._ints(name, offset)] = place

    def names(self) -> list[str]:
        """Of the tensors; what else lies in the files (pickled objects) is never read."""
        return list(self._tensors)

    def common(self) -> dict[str, Any]:
        """common.pt, with a Record for whatever is not plain data; {} where there is none, as DCP alone writes it."""
        if not (self.path / COMMON).is_file():
            return {}
        common = self._pickle(COMMON, lambda data: _unpickle(_zipped_pickle(data), _COMMON_CLASSES))
        if not isinstance(common, dict):
            raise CheckpointError(f"{self.path / COMMON} is damaged: it is not a dict")
        return common

    def entry(self, name: str) -> StoredTensor:
        """Dtype, shape and chunks of a tensor, all checked."""
        if name not in self._tensors:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        fields = self._tensors[name].fields()
        properties, chunks = fields.get("properties"), fields.get("chunks")
        state = properties.state if isinstance(properties, Record) else None
        dtype = state[0] if isinstance(state, tuple) and state else state.get("dtype") if isinstance(state, dict) else None
        if not isinstance(dtype, torch.dtype) or dtype not in STORED_NAMES:
            raise CheckpointError(f"{self.path}: tensor {name} is of dtype {reprlib.repr(dtype)}; supported: {', '.join(STORED_DTYPES)}")
        shape = self._ints(name, fields.get("size"))
        if math.prod(shape) * dtype.itemsize > MAX_INT or not isinstance(chunks, list):
            raise self._damaged(name)
        found = [self._chunk(name, chunk) for chunk in chunks]
        found = [chunk for chunk in found if 0 not in chunk.sizes or 0 in shape]  # a process that holds nothing of it may say so
        boxes = tuple(Box("", "", chunk.offsets, chunk.sizes, "") for chunk in found)
        if any(not len(shape) == len(box.offsets) == len(box.sizes) for box in boxes) or any(
                o + s > n for box in boxes for o, s, n in zip(box.offsets, box.sizes, shape, strict=True)):
            raise self._damaged(name)
        check_cover(f"{self.path}: tensor {name}", TensorEntry(STORED_NAMES[dtype], shape, boxes))
        return StoredTensor(dtype, shape, tuple(found))

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor; beside it at most one of its chunks is in memory."""
        entry = self.entry(name)
        if len(entry.chunks) == 1:
            return self._load(name, entry.chunks[0], entry.dtype)
        try:
            whole = torch.empty(entry.shape, dtype=entry.dtype)
        except RuntimeError:  # torch's word for memory that is not there
            num_bytes = math.prod(entry.shape) * entry.dtype.itemsize
            raise CheckpointError(f"{self.path}: there is no memory for tensor {name}, {num_bytes} bytes as {METADATA} says") from None
        for chunk in entry.chunks:
            window = tuple(slice(offset, offset + size) for offset, size in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[window] = self._load(name, chunk, entry.dtype)
        return whole

    def _check_backend(self) -> None:
        path = self.path / CONFIG
        if not path.is_file():  # DCP alone writes none
            return
        with disk_errors("read", path):
            raw = path.read_bytes()
        try:
            config = json.loads(raw)
        except (ValueError, RecursionError):
            raise CheckpointError(f"{path} is damaged: it is not JSON") from None
        backend = config.get("sharded_backend") if isinstance(config, dict) else None
        if backend != BACKENDS["sharded_backend"]:
            raise CheckpointError(f"{path}: sharded_backend = {reprlib.repr(backend)} is not supported; only 'torch_dist' is")

    def _pickle(self, name: str, parse: Callable[[bytes], Any]) -> Any:
        path = self.path / name
        with disk_errors("read", path):
            size = path.stat().st_size
            if size > MAX_PICKLE_BYTES:
                raise CheckpointError(f"{path} has {size} bytes, more than {MAX_PICKLE_BYTES}; it is not read")
            data = path.read_bytes()
        try:
            return parse(data)
        except CheckpointError as error:
            raise CheckpointError(f"{path} {error}") from None

    def _chunk(self, name: str, chunk: object) -> Chunk:
        fields = chunk.fields() if isinstance(chunk, Record) else {}
        offsets, sizes = self._ints(name, fields.get("offsets")), self._ints(name, fields.get("sizes"))
        place = self._places.get((name, offsets))
        where = place.fields() if isinstance(place, Record) else {}
        file, begin, length = where.get("relative_path"), where.get("offset"), where.get("length")
        if not isinstance(file, str) or not _FILE.fullmatch(file):
            raise CheckpointError(f"{self.path}: tensor {name} lies in {reprlib.repr(file)}, which is not a plain *.distcp file name")
        if type(begin) is not int or type(length) is not int or begin < 0 or length < 0:
            raise self._damaged(name)
        if where.get("transform_descriptors"):
            raise CheckpointError(f"{self.path}: tensor {name} is stored by an extension of DCP (compressed?), which is not supported")
        return Chunk(offsets, sizes, file, begin, length)

    def _load(self, name: str, chunk: Chunk, dtype: torch.dtype) -> torch.Tensor:
        path = self.path / chunk.file
        what = f"{path} at byte {chunk.begin}: tensor {name}"
        if not path.is_file():
            raise CheckpointError(f"{what} is missing: there is no such file")
        with disk_errors("read", path), open(path, "rb") as file:
            if chunk.begin + chunk.length > os.fstat(file.fileno()).st_size:
                raise CheckpointError(f"{what} ends beyond the file; get the file again")
            try:
                tensor = torch.load(io.BufferedReader(_Range(file, chunk.begin, chunk.length)), map_location="cpu", weights_only=True)
            except pickle.UnpicklingError:
                raise CheckpointError(f"{what} is damaged or no tensor: torch.load(weights_only=True) refuses it, and nothing of it was "
                                      "run. Do not trust this checkpoint") from None
            except _DAMAGE as error:
                line = str(error).partition("\n")[0]
                raise CheckpointError(f"{what} is damaged ({reprlib.repr(line or type(error).__name__)}); get the file again") from None
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.dtype != dtype or tensor.shape != chunk.sizes:
            raise CheckpointError(f"{what} is not of dtype {dtype} and shape {list(chunk.sizes)}, as {METADATA} says")
        return tensor.detach()

    def _ints(self, name: str, value: object) -> tuple[int, ...]:
        if not isinstance(value, tuple) or len(value) > MAX_DIMS or any(type(v) is not int or not 0 <= v <= MAX_INT for v in value):
            raise self._damaged(name)
        return value

    def _damaged(self, name: str) -> CheckpointError:
        return CheckpointError(f"{self.path / METADATA} is damaged: what it says of tensor {name} makes no sense")


class _Range(io.RawIOBase):
    """Bytes [begin, begin + length) of a file, as a file."""

    def __init__(self, file: Any, begin: int, length: int) -> None:
        self._file, self._begin, self._length, self._at = file, begin, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[:max(0, self._length - self._at)]
        self._file.seek(self._begin + self._at)
        count: int = self._file.readinto(view)
        self._at += count
        return count


def _zipped_pickle(data: bytes) -> bytes:
    """data.pkl of a file of torch.save. One from before torch 1.6 is not a zip and is refused."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [info for info in archive.infolist() if info.filename.count("/") == 1 and info.filename.endswith("/data.pkl")]
            if len(members) != 1 or members[0].file_size > len(data):  # torch stores it as it is: no longer than the file
                raise CheckpointError("is damaged: it is not a file of torch.save")
            return archive.read(members[0])
    except _DAMAGE as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"is damaged: {reprlib.repr(str(error))}") from None


class TorchDistWriter(NewDirectory):
    """Stream whole tensors into a new directory, one in memory at a time.

        with TorchDistWriter(directory, max_file_bytes=4 << 30) as writer:
            writer.add("decoder.final_layernorm.weight", tensor)
            writer.common = {"iteration": 1000}

    Everything goes to a hidden sibling, which takes the directory's name at the end; an exception inside the `with` removes it. The
    directory must not exist or be empty, or be an older one of this format with `overwrite`. CheckpointError if it cannot be written.
    Pickles are written because the format is made of them, and only of torch's own classes, argparse.Namespace and plain values.
    """

    def __init__(self, directory: Path, *, max_file_bytes: int, overwrite: bool = False) -> None:
        self.max_file_bytes = max_file_bytes
        self.common: dict[str, Any] = {}
        self._entries: dict[str, TensorStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._num_files = 0
        self._file: io.BufferedWriter | None = None
        super().__init__(directory, overwrite=overwrite, mark=METADATA)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if name in self._entries or tensor.dtype not in STORED_NAMES:
            raise CheckpointError(f"tensor {name} is added twice, or is {tensor.dtype}")
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # torch.save writes the whole storage of a view
        start = torch.Size([0] * tensor.dim())
        with disk_errors("write", self.directory):
            file, path = self._file_for(tensor.nbytes)
            begin = file.tell()
            save_pickle(tensor, file)
            self._places[MetadataIndex(name, start, 0)] = _StorageInfo(path, begin, file.tell() - begin)
        chunk = ChunkStorageMetadata(start, tensor.shape)
        self._entries[name] = TensorStorageMetadata(TensorProperties(tensor.dtype), tensor.shape, [chunk])

    def close(self) -> None:
        """common.pt, metadata.json, .metadata; then the directory's name."""
        paths = {name: (name,) for name in self._entries}  # where torch's dcp_to_torch_save puts each in a nested dict: at the top
        metadata = Metadata(dict(self._entries), paths, self._places, StorageMeta(), CURRENT_DCP_VERSION)
        with disk_errors("write", self.directory):
            self._finish_file()
            for name, write in ((COMMON, lambda file: save_pickle(self.common, file)),
                                (CONFIG, lambda file: file.write(json.dumps(BACKENDS).encode("ascii"))),
                                (METADATA, lambda file: pickle.dump(metadata, file))):
                with open(self.hidden / name, "xb") as file:
                    write(file)
                    _sync(file)
            sync_directory(self.hidden)
        super().close()

    def abort(self) -> None:
        """Remove what was written."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # of a full disk; it has been said
                self._file.close()
        super().abort()

    def _file_for(self, num_bytes: int) -> tuple[io.BufferedWriter, str]:
        if self._file is not None and self._file.tell() + num_bytes > self.max_file_bytes:
            self._finish_file()
        if self._file is None:
            self._file = open(self.hidden / f"__0_{self._num_files}.distcp", "xb")
            self._num_files += 1
        return self._file, f"__0_{self._num_files - 1}.distcp"

    def _finish_file(self) -> None:
        if self._file is not None:
            _sync(self._file)
            self._file.close()
            self._file = None


def save_pickle(value: Any, file: io.BufferedWriter) -> None:
    """torch.save. After a write that failed its own writer fails too, and its RuntimeError hides why."""
    try:
        torch.save(value, file)
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        raise cause or error from None


def _sync(file: io.BufferedWriter) -> None:
    file.flush()
    os.fsync(file.fileno())


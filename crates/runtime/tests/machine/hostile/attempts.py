"""Makes the attempts of the file that its argument names, each in a process of its own, and says how they went.

Runs as root of a machine, and once more on the host to show that the same attempt works, or gets further, there. An
attempt is a list of a name, a kind and arguments; a text among a system call's arguments is passed as a pointer.
"""

import ctypes
import errno
import json
import mmap
import os
import signal
import sys

LIBC = ctypes.CDLL(None, use_errno=True)
PATIENCE_SECONDS = 60


def checked(result):
    if result == -1:
        raise OSError(ctypes.get_errno(), "")
    return result


def syscall(number, *arguments):
    passed = [a.encode() if isinstance(a, str) else ctypes.c_long(a) for a in arguments]
    result = checked(LIBC.syscall(ctypes.c_long(number), *passed))
    if result == 0 and os.getpid() != SELF:
        os._exit(0)  # a clone
    return "done"


def write(path, text):
    with open(path, "w") as file:
        file.write(text)
    return "done"


def open_to_write(path):
    os.close(os.open(path, os.O_WRONLY))
    return "done"


def read(path):
    with open(path, "rb") as file:
        return "done" if file.read(64).strip(b"\0\n ") else "empty"


def listing(path):
    return " ".join(sorted(os.listdir(path))) or "empty"


def readlink(path):
    os.readlink(path)
    return "done"


def connect_abstract(name):
    import socket

    with socket.socket(socket.AF_UNIX) as client:
        client.connect("\0" + name)
    return "done"


def machine_code(code):
    """Runs instructions, and gives what they leave in the register of results."""
    memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(bytes.fromhex(code))
    function = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
    result = function()
    if result < 0:
        raise OSError(-result, "")
    return "done"


KINDS = {f.__name__: f for f in (syscall, write, open_to_write, read, listing, readlink, connect_abstract, machine_code)}


def outcome(kind, arguments):
    """What a child that makes the attempt says, or the signal that ended it."""
    global SELF
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        SELF = os.getpid()
        signal.alarm(PATIENCE_SECONDS)
        try:
            said = KINDS[kind](*arguments)
        except OSError as error:
            said = errno.errorcode.get(error.errno, str(error.errno))
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        said = file.read().decode()
    _, status = os.waitpid(child, 0)
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else said


with open(sys.argv[1]) as attempts:
    for name, kind, arguments in json.load(attempts):
        print(json.dumps([name, outcome(kind, arguments)]), flush=True)

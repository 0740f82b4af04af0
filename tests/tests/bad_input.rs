//! What is wrong with the input is said so that one can act on it: the thing, what was expected, what to do; with a
//! non-zero exit code, and nothing lost.
#![allow(clippy::unwrap_used)]

mod support;

use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use support::{binary, clean, example, fail, ingested, model, quire, succeed};

/// The reference model in a folder of its own: links, to be replaced where something is to be wrong.
fn linked_model(dir: &Path) -> PathBuf {
    let folder = dir.join("model");
    std::fs::create_dir(&folder).unwrap();
    for entry in std::fs::read_dir(model()).unwrap() {
        let path = entry.unwrap().path();
        symlink(&path, folder.join(path.file_name().unwrap())).unwrap();
    }
    folder
}

/// Puts other contents in the place of a file of the model.
fn replace(model: &Path, name: &str, change: impl FnOnce(Vec<u8>) -> Vec<u8>) {
    let path = model.join(name);
    let contents = std::fs::read(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, change(contents)).unwrap();
}

fn replace_json(model: &Path, name: &str, change: impl FnOnce(&mut Value)) {
    replace(model, name, |bytes| {
        let mut value = serde_json::from_slice(&bytes).unwrap();
        change(&mut value);
        serde_json::to_vec(&value).unwrap()
    });
}

/// Ingesting with a broken model must fail with all of `parts` in the message.
fn broken_model(change: impl FnOnce(&Path), parts: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let folder = linked_model(dir.path());
    change(&folder);
    let data = dir.path().join("data");
    let mut command = Command::new(binary());
    clean(&mut command, &data);
    command.arg("ingest").args(example().documents).arg("--data-dir").arg(&data).arg("--model").arg(&folder);
    fail(&mut command, 1, parts);
    assert!(!data.join("chunks").exists(), "a store was made for a broken model");
    // The doctor finds it, too.
    let mut doctor = Command::new(binary());
    clean(&mut doctor, &data);
    fail(doctor.arg("doctor").arg("--data-dir").arg(&data).arg("--model").arg(&folder), 1, &["to put right"]);
}

fn chunks(data: &Path) -> u64 {
    let stats: Value = serde_json::from_str(&succeed(quire(data).args(["cache", "stats", "--json"]))).unwrap();
    stats["chunks"].as_u64().unwrap()
}

#[test]
fn missing_weights() {
    broken_model(
        |model| std::fs::remove_file(model.join("model.safetensors")).unwrap(),
        &["model.safetensors", "missing"],
    );
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let mut command = Command::new(binary());
    clean(&mut command, &data);
    command.arg("ingest").args(example().documents).arg("--data-dir").arg(&data);
    fail(command.args(["--model", "nowhere"]), 1, &["nowhere", "config.json", "missing"]);
}

#[test]
fn truncated_weights() {
    let cut = |bytes: Vec<u8>| bytes[..bytes.len() / 2].to_vec();
    broken_model(
        |model| replace(model, "model.safetensors", cut),
        &["model.safetensors", "damaged", "Fetch the file again"],
    );
    let nearly_nothing = |_| vec![1, 2, 3];
    broken_model(|model| replace(model, "model.safetensors", nearly_nothing), &["model.safetensors", "damaged"]);
}

#[test]
fn corrupt_weights() {
    let garbage = |mut bytes: Vec<u8>| {
        bytes[8..200].fill(b'#');
        bytes
    };
    broken_model(|model| replace(model, "model.safetensors", garbage), &["model.safetensors", "damaged"]);
}

#[test]
fn weights_that_are_not_finite_leave_nothing_in_the_store() {
    let dir = tempfile::tempdir().unwrap();
    let folder = linked_model(dir.path());
    replace(&folder, "model.safetensors", |mut bytes| {
        // The last tensor's last number becomes a NaN, and every other one of its end as well.
        let end = bytes.len();
        bytes[end - 4096..].fill(0xff);
        bytes
    });
    let data = dir.path().join("data");
    let mut command = Command::new(binary());
    clean(&mut command, &data);
    command.arg("ingest").args(example().documents).arg("--data-dir").arg(&data).arg("--model").arg(&folder);
    fail(&mut command, 1, &["not finite", "nothing was stored", "checksum"]);
    let mut stats = Command::new(binary());
    clean(&mut stats, &data);
    let stats = stats.args(["cache", "stats", "--json", "--data-dir"]).arg(&data);
    let stats: Value = serde_json::from_str(&succeed(stats)).unwrap();
    assert_eq!(stats["chunks"], 0);
}

#[test]
fn unknown_architecture() {
    let change = |config: &mut Value| {
        config["architectures"] = json!(["GPTNeoXForCausalLM"]);
        config["model_type"] = json!("gpt_neox");
    };
    broken_model(
        |model| replace_json(model, "config.json", change),
        &["architecture", "GPTNeoXForCausalLM", "LlamaForCausalLM"],
    );
}

#[test]
fn weights_of_another_shape() {
    let change = |config: &mut Value| config["intermediate_size"] = json!(656);
    broken_model(|model| replace_json(model, "config.json", change), &["mlp", "656", "640", "config.json"]);
}

#[test]
fn a_tokenizer_of_another_model() {
    // Its words have other numbers, two hundred of them beyond the model's.
    let change = |tokenizer: &mut Value| {
        for id in tokenizer["model"]["vocab"].as_object_mut().unwrap().values_mut() {
            *id = json!(id.as_u64().unwrap() + 200);
        }
    };
    broken_model(
        |model| replace_json(model, "tokenizer.json", change),
        &["tokenizer and model do not belong together", "vocabulary of 7168", "tokenizer.json"],
    );
}

#[test]
fn documents_without_text_are_left_out_and_the_others_kept() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let documents = dir.path().join("documents");
    std::fs::create_dir(&documents).unwrap();
    std::fs::write(documents.join("good.md"), "# Lamps\n\nThe lamp of Varn Point was lit in 1851.\n").unwrap();
    std::fs::write(documents.join("latin1.txt"), b"The caf\xe9 by the quay.").unwrap();
    std::fs::write(documents.join("empty.txt"), b"").unwrap();
    fail(
        quire(&data).arg("ingest").arg(&documents),
        1,
        &["latin1.txt", "UTF-8", "offset 7", "iconv", "1 of 3 documents"],
    );
    assert!(succeed(quire(&data).args(["search", "lamp"])).contains("good.md"));

    // A document that has become unreadable keeps its place in the collection.
    std::fs::write(documents.join("good.md"), b"\xff\xfe").unwrap();
    fail(quire(&data).arg("ingest").arg(documents.join("good.md")), 1, &["good.md", "offset 0"]);
    assert!(succeed(quire(&data).args(["search", "lamp"])).contains("lit in 1851"));

    fail(quire(&data).arg("ingest").arg(documents.join("empty.txt")), 1, &["empty.txt", "no bytes"]);
    std::fs::write(documents.join("scan.pdf"), b"%PDF-1.7").unwrap();
    fail(quire(&data).arg("ingest").arg(documents.join("scan.pdf")), 1, &["scan.pdf", ".md", "found .pdf"]);
    fail(quire(&data).arg("ingest").arg(documents.join("absent.txt")), 1, &["absent.txt"]);
}

#[test]
fn a_prompt_beyond_the_context_limit() {
    let dir = ingested();
    let data = dir.path().join("data");
    let question = "Where was the man seen who came from the north? ".repeat(60);
    let limit = ["--max-context", "512", "--max-tokens", "32"];
    fail(quire(&data).args(["ask", &question]).args(limit), 1, &["context", "the limit is 512", "Shorten the prompt"]);
    // A question that fits is answered from as many passages as fit, and the answer says so.
    let printed = succeed(quire(&data).args(["ask", &example().question, "--json"]).args(limit));
    let printed: Value = serde_json::from_str(&printed).unwrap();
    assert!(printed["answer"]["notes"].to_string().contains("were left out"), "{printed}");
    assert!(printed["answer"]["stats"]["prompt_tokens"].as_u64().unwrap() <= 480, "{printed}");
}

#[test]
fn chunks_of_another_model_are_not_used_and_stay_beside_those_of_this_one() {
    let dir = ingested();
    let data = dir.path().join("data");
    let before = chunks(&data);
    let other = linked_model(dir.path());
    replace(&other, "model.safetensors", |mut bytes| {
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        bytes
    });
    // The same weights under another configuration give other numbers: another model as well.
    let third = tempfile::tempdir().unwrap();
    let third = linked_model(third.path());
    replace_json(&third, "config.json", |config| config["rms_norm_eps"] = json!(0.5));
    let mut held = before;
    for model in [&other, &third] {
        let mut command = Command::new(binary());
        clean(&mut command, &data);
        command.args(["ask", &example().question, "--json", "--data-dir"]).arg(&data).arg("--model").arg(model);
        let printed: Value = serde_json::from_str(&succeed(&mut command)).unwrap();
        assert_eq!(printed["answer"]["stats"]["chunks_cached"], 0, "{printed}");
        let now = chunks(&data);
        assert!(now > held, "{now} after {held} chunks");
        held = now;
    }
    let stats: Value = serde_json::from_str(&succeed(quire(&data).args(["cache", "stats", "--json"]))).unwrap();
    let models: Vec<u64> =
        stats["models"].as_array().unwrap().iter().map(|model| model["chunks"].as_u64().unwrap()).collect();
    assert_eq!((models.len(), models.iter().sum::<u64>()), (3, held));
    assert!(before > 0 && models.contains(&before), "{models:?}");
    succeed(quire(&data).args(["cache", "verify"]));
}

#[test]
fn a_flipped_byte_is_found_recomputed_and_never_served() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let document = dir.path().join("ropeworks.md");
    let text = "Hilda Stanmorrow grew up in Inverloft. She learned to spin hemp before she could read, and walked \
                backwards for her living like her father. The shed was two hundred and forty yards long.";
    std::fs::write(&document, text).unwrap();
    succeed(quire(&data).arg("ingest").arg(&document));
    let ask = |more: &[&str]| -> Value {
        let printed = succeed(quire(&data).args(["ask", "Where did Hilda Stanmorrow grow up?", "--json"]).args(more));
        serde_json::from_str::<Value>(&printed).unwrap()["answer"].clone()
    };
    let state = |answer: &Value| {
        ["chunks_cached", "chunks_computed", "chunks_failed"].map(|name| answer["stats"][name].as_u64().unwrap())
    };
    let intact = ask(&[]);
    assert_eq!(state(&intact), [1, 0, 0], "{intact}");

    // The largest table holds the payload.
    let files = std::fs::read_dir(data.join("chunks")).unwrap().map(|entry| entry.unwrap().path());
    let tables = files.filter(|path| path.extension().is_some_and(|end| end == "sst"));
    let largest = tables.max_by_key(|path| path.metadata().unwrap().len()).unwrap();
    let mut bytes = std::fs::read(&largest).unwrap();
    assert!(bytes.len() > 100_000, "{} is too small to be the payload", largest.display());
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    std::fs::write(&largest, bytes).unwrap();

    let damaged = ask(&[]);
    let [_, computed, failed] = state(&damaged);
    assert_eq!(computed + failed, 1, "the damage went unnoticed: {damaged}");
    assert_eq!(damaged["text"], ask(&["--blend", "full-recompute"])["text"]);
    // The use after the damage was found stores it anew; from then on it is cached again.
    ask(&[]);
    let healed = ask(&[]);
    assert_eq!((state(&healed), &healed["text"]), ([1, 0, 0], &intact["text"]));
    succeed(quire(&data).args(["cache", "verify"]));
}

#[test]
fn a_port_in_use() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    fail(quire(&data).args(["serve", "--port", &port]), 1, &["cannot listen on 127.0.0.1:", &port, "in use", "--port"]);
    fail(quire(&data).args(["serve", "--host", "no such host"]), 1, &["cannot listen on no such host"]);
}

#[test]
fn a_data_folder_that_cannot_be_written() {
    let dir = ingested();
    let file = dir.path().join("a-file");
    std::fs::write(&file, "x").unwrap();
    let below = file.join("data");
    let mut command = Command::new(binary());
    clean(&mut command, &file);
    command.arg("ingest").args(example().documents).arg("--data-dir").arg(&below).arg("--model").arg(model());
    fail(&mut command, 1, &["data folder", "a-file", "--data-dir"]);
}

/// Permissions do not bind root: then the program runs as nobody, with copies that nobody can read.
#[test]
fn a_read_only_data_folder_keeps_what_it_has() {
    let dir = ingested();
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let data = dir.path().join("data");
    let before = chunks(&data);
    let (program, model) = (dir.path().join("quire"), dir.path().join("model"));
    std::fs::copy(binary(), &program).unwrap();
    std::fs::create_dir(&model).unwrap();
    for entry in std::fs::read_dir(support::model()).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, model.join(path.file_name().unwrap())).unwrap();
    }
    let documents = dir.path().join("documents");
    std::fs::create_dir(&documents).unwrap();
    std::fs::write(documents.join("new.md"), "The lamp of Varn Point was lit in 1851.\n").unwrap();
    let set_mode = |mode: &str| {
        let status = Command::new("chmod").args(["-R", mode]).arg(dir.path()).status();
        assert!(status.unwrap().success());
    };
    set_mode("a+rX,a-w");
    let root = std::fs::metadata("/proc/self").map(|m| std::os::unix::fs::MetadataExt::uid(&m) == 0).unwrap();
    let mut command = if root {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&program);
        command
    } else {
        Command::new(&program)
    };
    clean(&mut command, &data);
    command.arg("ingest").arg(&documents).arg("--data-dir").arg(&data).arg("--model").arg(&model);
    let output = command.output().unwrap();
    set_mode("u+w");
    let (_, stderr) = support::texts(&output);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    for part in ["data folder", "ermission denied", "Make it writable", "--data-dir"] {
        assert!(stderr.contains(part), "expected `{part}` in: {stderr}");
    }
    assert_eq!(chunks(&data), before);
    succeed(quire(&data).args(["cache", "verify"]));
}

#[test]
fn a_result_that_cannot_be_written_is_a_failure_and_a_log_that_cannot_is_none() {
    let dir = ingested();
    let data = dir.path().join("data");
    let full = || std::fs::File::options().write(true).open("/dev/full").unwrap();
    let status = quire(&data).args(["search", "river"]).stdout(full()).status().unwrap();
    assert_eq!(status.code(), Some(1));
    let mut warns = quire(&data);
    warns.args(["search", "river"]).env("QUIRE_TYPO", "1").stdout(std::process::Stdio::null()).stderr(full());
    assert_eq!(warns.status().unwrap().code(), Some(0));
}

#[test]
fn wrong_usage_has_an_exit_code_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    fail(quire(&data).args(["ask"]), 2, &["QUESTION"]);
    fail(quire(&data).args(["ask", " "]), 2, &["QUESTION", "white space"]);
    fail(quire(&data).args(["ask", "Who?", "--strategy", "magic"]), 2, &["magic", "retrieval"]);
    fail(quire(&data).args(["ask", "Who?", "--collection", "../x"]), 2, &["../x", "letters"]);
    fail(quire(&data).args(["ask", "Who?"]).env("QUIRE_RATIO", "2"), 2, &["ratio", "QUIRE_RATIO", "0 to 1"]);
    fail(quire(&data).args(["ask", "Who?", "--k", "18446744073709551615"]), 2, &["attention k", "at most"]);
    fail(quire(&data).args(["search", "x", "--top-chunks", "99999999999"]), 2, &["top_chunks", "at most 1024"]);
    fail(quire(&data).args(["search", "x"]), 1, &["collection `default` does not exist", "quire ingest"]);
    fail(quire(&data).args(["search", "x", "--top-chunks", "-1"]), 2, &["'-1'", "--top-chunks", "at least 0"]);
    fail(quire(&data).args(["serve", "--port", "-1"]), 2, &["'-1'", "--port", "from 0 to 65535"]);
    fail(quire(&data).args(["ask", "Who?", "--ratio", "-0.5"]), 2, &["ratio", "0 to 1", "-0.5"]);
    fail(quire(&data).args(["serve", "--cache-bytes", "-1"]), 2, &["'-1'", "8G or 1.5GiB"]);
    for value in ["x", "-1", "1.5"] {
        let mut search = quire(&data);
        search.args(["search", "x"]).env("QUIRE_TOP_CHUNKS", value);
        fail(&mut search, 2, &["top_chunks", "environment QUIRE_TOP_CHUNKS", value]);
    }
    fail(quire(&data).args(["serve", "--log", "foo"]), 2, &["flag --log", "`foo`", "`info,quire=debug`"]);
    fail(quire(&data).args(["serve", "--allowed-hosts", "http://x"]), 2, &["allowed_hosts", "`http://x`", "scheme"]);
}

//! `quire pull` against a hub on this machine: what arrives is whole, verified and where the hub's own tools look; what
//! goes wrong on the way is said, and nothing wrong stays.
#![allow(clippy::unwrap_used)]

#[path = "support/hub.rs"]
mod hub;
mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use hub::{Behaviour, COMMIT, Hub, hash};
use serde_json::Value;
use support::{binary, clean, eventually, fail, model, python, succeed, texts};
use tempfile::TempDir;

const WEIGHTS: &str = "model.safetensors";

/// The reference model's description with made-up weights: fetching does not read them.
fn files() -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    for name in ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "prompt.json"] {
        files.insert(name.to_string(), std::fs::read(model().join(name)).unwrap());
    }
    let weights = (0..3_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    files.insert(WEIGHTS.into(), weights);
    files
}

fn with_files() -> Behaviour {
    Behaviour { files: files(), ..Behaviour::default() }
}

/// A hub and a cache of its own.
struct Place {
    hub: Hub,
    dir: TempDir,
}

impl Place {
    fn new(behaviour: Behaviour) -> Place {
        Place { hub: Hub::start(behaviour), dir: tempfile::tempdir().unwrap() }
    }

    /// The program without a model.
    fn quire(&self, words: &[&str]) -> Command {
        let mut command = Command::new(binary());
        let data = self.dir.path().join("data");
        clean(&mut command, &data);
        command.env("HF_HOME", self.dir.path().join("home")).env("HF_ENDPOINT", self.hub.endpoint());
        command.args(words).env("QUIRE_DATA_DIR", &data);
        command
    }

    fn pull(&self) -> Command {
        self.quire(&["pull", "test/model", "--json"])
    }

    /// Pulls and returns the last line: the report.
    fn pulled(&self) -> Value {
        let printed = succeed(&mut self.pull());
        serde_json::from_str(printed.lines().last().unwrap()).unwrap()
    }

    fn repository(&self) -> PathBuf {
        self.dir.path().join("home/hub/models--test--model")
    }

    fn snapshot(&self) -> PathBuf {
        self.repository().join("snapshots").join(COMMIT)
    }

    /// The blob of a file, or what there is of it.
    fn blob(&self, name: &str, ending: &str) -> PathBuf {
        let contents = &files()[name];
        self.repository().join("blobs").join(format!("{}{ending}", hash(name, contents)))
    }

    fn names_in(&self, folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(folder)
            .map(|entries| entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect())
            .unwrap_or_default();
        names.sort();
        names
    }
}

/// What became of a file in a report.
fn state<'a>(report: &'a Value, name: &str) -> &'a str {
    let files = report["files"].as_array().unwrap();
    files.iter().find(|file| file["name"] == name).unwrap()["state"].as_str().unwrap()
}

#[test]
fn a_model_arrives_whole_in_the_layout_of_the_hubs_tools() {
    let place = Place::new(Behaviour { token: Some("hf_secret"), ..with_files() });
    place.hub.change(|b| {
        for other in ["README.md", "pytorch_model.bin", ".gitattributes", "onnx/model.safetensors", "other.safetensors"]
        {
            b.files.insert(other.into(), b"not needed".to_vec());
        }
    });
    let output = place.quire(&["pull", "test/model"]).env("HF_TOKEN", "hf_secret").output().unwrap();
    let (printed, progress) = texts(&output);
    assert!(output.status.success(), "{printed}\n{progress}");
    assert!(progress.contains("fetching") && progress.contains("complete, "), "{progress}");
    assert!(!printed.contains("fetching") && !printed.contains("complete, "), "progress is no result: {printed}");
    let folder = place.snapshot();
    assert!(printed.contains(&folder.display().to_string()), "{printed}");
    assert!(printed.contains("--model test/model") && printed.contains(COMMIT), "{printed}");
    assert!(!printed.contains('\x1b'), "no bar where nobody looks: {printed}");

    let wanted: Vec<String> = files().into_keys().collect();
    assert_eq!(place.names_in(&folder), wanted);
    for (name, contents) in files() {
        let target = std::fs::read_link(folder.join(&name)).unwrap();
        assert_eq!(target, Path::new("../../blobs").join(hash(&name, &contents)));
        assert!(std::fs::read(folder.join(&name)).unwrap() == contents, "{name} differs");
    }
    assert_eq!(std::fs::read_to_string(place.repository().join("refs/main")).unwrap(), COMMIT);

    let asked = place.hub.asked();
    let (storage, hub): (Vec<_>, Vec<_>) = asked.iter().partition(|a| a.path.starts_with("/storage/"));
    assert!(hub.iter().all(|a| a.authorization.as_deref() == Some("Bearer hf_secret")), "{hub:?}");
    assert!(!storage.is_empty() && storage.iter().all(|a| a.authorization.is_none()), "the token left: {storage:?}");

    // Once more: nothing is fetched, and a pinned commit is another name for the same.
    std::fs::write(place.dir.path().join("home/token"), "hf_secret\n").unwrap();
    let again = place.pulled();
    assert!(again["files"].as_array().unwrap().iter().all(|file| file["state"] == "cached"), "{again}");
    assert!(place.hub.asked().iter().all(|a| a.method == "HEAD" || a.path.starts_with("/api/")));
    succeed(&mut place.quire(&["pull", &format!("test/model@{COMMIT}")]));
    succeed(&mut place.quire(&["pull", "test/model@refs/pr/1"]));
    assert_eq!(place.names_in(&place.repository().join("refs")), ["main", "refs"]);
}

#[test]
fn a_pulled_model_is_used_by_its_name() {
    let place = Place::new(with_files());
    let weights = std::fs::read(model().join(WEIGHTS)).unwrap();
    place.hub.change(|b| drop(b.files.insert(WEIGHTS.into(), weights)));
    let absent = &["test/model", "found neither", "Fetch it with `quire pull test/model`"];
    fail(&mut place.quire(&["ingest", ".", "--model", "test/model"]), 1, absent);
    fail(&mut place.quire(&["doctor", "--model", "test/model"]), 1, &["to put right"]);
    place.pulled();
    place.hub.asked();
    let found = succeed(&mut place.quire(&["doctor", "--model", "test/model"]));
    assert!(found.contains(COMMIT) && found.contains("loaded"), "{found}");
    succeed(place.quire(&["doctor"]).env("QUIRE_MODEL", format!("test/model@{COMMIT}")));
    fail(&mut place.quire(&["doctor", "--model", "test/model@other"]), 1, &["to put right"]);
    assert!(place.hub.asked().is_empty(), "using a model asks nobody");

    std::fs::remove_file(place.snapshot().join("tokenizer.json")).unwrap();
    let part = &["lacks tokenizer.json", "Complete it with `quire pull test/model`"];
    fail(&mut place.quire(&["ingest", ".", "--model", "test/model"]), 1, part);
}

#[test]
fn an_interrupted_pull_is_resumed_and_what_is_there_is_not_fetched_twice() {
    let place = Place::new(Behaviour { cut: Some((WEIGHTS, 300_000, usize::MAX)), ..with_files() });
    // Each attempt brings some more; the program is killed while it still tries.
    let mut child = place.pull().stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let partial = place.blob(WEIGHTS, ".incomplete");
    eventually("some of it has come", || std::fs::metadata(&partial).is_ok_and(|m| m.len() >= 600_000));
    child.kill().unwrap();
    child.wait().unwrap();
    let have = std::fs::metadata(&partial).unwrap().len();
    assert!(!place.repository().join("refs/main").exists(), "what is incomplete has no name");

    place.hub.change(|b| b.cut = None);
    place.hub.asked();
    let report = place.pulled();
    assert_eq!((state(&report, WEIGHTS), state(&report, "tokenizer.json")), ("resumed", "cached"));
    let fetched: Vec<_> =
        place.hub.asked().into_iter().filter(|a| a.method == "GET" && a.path.contains(WEIGHTS)).collect();
    assert!(fetched.iter().all(|a| a.range == Some(format!("bytes={have}-"))), "{fetched:?}");
    assert!(std::fs::read(place.snapshot().join(WEIGHTS)).unwrap() == files()[WEIGHTS]);
    assert!(!partial.exists());
}

#[test]
fn a_server_that_dies_is_asked_again_and_given_up_in_the_end() {
    let place = Place::new(Behaviour { cut: Some((WEIGHTS, 1_000_000, 2)), ..with_files() });
    let output = place.pull().output().unwrap();
    let (stdout, stderr) = texts(&output);
    assert!(output.status.success(), "{stderr}");
    assert_eq!(stdout.matches("\"event\":\"retry\"").count(), 2, "{stdout}");
    assert!(std::fs::read(place.snapshot().join(WEIGHTS)).unwrap() == files()[WEIGHTS]);

    let dead = Place::new(Behaviour { cut: Some((WEIGHTS, 0, usize::MAX)), ..with_files() });
    fail(&mut dead.pull(), 1, &["cannot fetch", WEIGHTS, "0 of 3000000 bytes", "goes on where it stopped"]);
    let mut nobody = dead.pull();
    fail(nobody.env("HF_ENDPOINT", "http://127.0.0.1:9"), 1, &["cannot fetch http://127.0.0.1:9/api", "HF_ENDPOINT"]);
}

#[test]
fn a_server_without_ranges_sends_everything_once_more() {
    let place = Place::new(Behaviour { cut: Some((WEIGHTS, 1_000_000, 1)), without_ranges: true, ..with_files() });
    place.pulled();
    assert!(std::fs::read(place.snapshot().join(WEIGHTS)).unwrap() == files()[WEIGHTS]);

    // Too much is there already: it cannot be a part of the file.
    let place = Place::new(with_files());
    let partial = place.blob(WEIGHTS, ".incomplete");
    std::fs::create_dir_all(partial.parent().unwrap()).unwrap();
    std::fs::write(&partial, vec![7; 4_000_000]).unwrap();
    place.pulled();
    assert!(std::fs::read(place.snapshot().join(WEIGHTS)).unwrap() == files()[WEIGHTS]);
}

#[test]
fn contents_with_another_hash_are_discarded() {
    for name in [WEIGHTS, "config.json"] {
        let place = Place::new(Behaviour { corrupt: Some(name), ..with_files() });
        let expected = hash(name, &files()[name]);
        fail(&mut place.pull(), 1, &[name, &format!("expected contents with the hash {expected}"), "discarded"]);
        assert!(!place.blob(name, "").exists() && !place.blob(name, ".incomplete").exists());
        assert!(!place.snapshot().join(name).exists());
        fail(&mut place.quire(&["doctor", "--model", "test/model"]), 1, &["to put right"]);
        place.hub.change(|b| b.corrupt = None);
        place.pulled();
    }
    // What an earlier attempt left was damaged since: found as well.
    let place = Place::new(with_files());
    let partial = place.blob(WEIGHTS, ".incomplete");
    std::fs::create_dir_all(partial.parent().unwrap()).unwrap();
    std::fs::write(&partial, vec![7; 1000]).unwrap();
    fail(&mut place.pull(), 1, &[WEIGHTS, "discarded", "run the command again"]);
    assert_eq!(state(&place.pulled(), WEIGHTS), "fetched");
}

#[test]
fn refusals_say_what_to_do() {
    let place = Place::new(Behaviour { token: Some("hf_secret"), ..with_files() });
    let page = format!("{}/test/model", place.hub.endpoint());
    fail(&mut place.pull(), 1, &["gated", "accept its licence", &page, "HF_TOKEN"]);
    fail(place.pull().env("HF_TOKEN", "hf_other"), 1, &["gated", "has not been granted access", &page]);

    place.hub.change(|b| b.token = None);
    let pull = |id: &str| place.quire(&["pull", id]);
    fail(&mut pull("test/absent"), 1, &["test/absent", "no such model", "Check the spelling", "HF_TOKEN"]);
    fail(pull("test/absent").env("HF_TOKEN", "hf_any"), 1, &["test/absent", "has no model", "spelling"]);
    fail(&mut pull("test/model@absent"), 1, &["test/model@absent", "has no revision"]);
    for id in ["model", "../x", "a/../../x", "a/b@../x"] {
        fail(&mut pull(id), 2, &[id, "OWNER/NAME"]);
    }
    assert!(!place.repository().exists());
}

#[test]
fn names_that_would_leave_the_folder_are_refused() {
    let evil = |change: &dyn Fn(&mut Behaviour), parts: &[&str]| {
        let place = Place::new(with_files());
        place.hub.change(|b| change(b));
        let before = place.names_in(place.dir.path());
        fail(&mut place.pull(), 1, parts);
        let mut after = place.names_in(place.dir.path());
        after.retain(|name| name != "home");
        assert_eq!(after, before);
        assert!(!place.repository().join("refs").exists());
    };
    evil(&|b| drop(b.files.insert("../x.safetensors".into(), vec![1])), &["`../x.safetensors`", "refused"]);
    evil(&|b| drop(b.files.insert("/tmp/x".into(), vec![1])), &["`/tmp/x`", "refused"]);
    evil(&|b| b.commit = Some("../../../../x"), &["a commit in `sha`", "../../../../x"]);
    evil(&|b| b.etag = Some((WEIGHTS, "../../../x")), &["a hash in X-Linked-Etag", "../../../x"]);
    let index = |b: &mut Behaviour| {
        b.files.remove(WEIGHTS);
        b.files.insert("model.safetensors.index.json".into(), br#"{"weight_map": {"a": "../../x"}}"#.to_vec());
    };
    evil(&index, &["index.json", "`../../x`", "refused"]);
}

#[test]
fn of_weights_in_shards_those_of_the_index_are_fetched() {
    let place = Place::new(with_files());
    place.hub.change(|b| {
        let weights = b.files.remove(WEIGHTS).unwrap();
        let map = br#"{"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-1.safetensors"}}"#;
        b.files.insert("model.safetensors.index.json".into(), map.to_vec());
        b.files.insert("m-1.safetensors".into(), weights.clone());
        b.files.insert("consolidated.safetensors".into(), weights);
    });
    fail(&mut place.pull(), 1, &["has no m-2.safetensors"]);
    place.hub.change(|b| drop(b.files.insert("m-2.safetensors".into(), vec![1; 10])));
    let report = place.pulled();
    assert_eq!((state(&report, "m-1.safetensors"), state(&report, "m-2.safetensors")), ("cached", "fetched"));
    assert!(!place.names_in(&place.snapshot()).contains(&"consolidated.safetensors".into()));
}

#[test]
fn what_the_engine_does_not_run_is_not_fetched() {
    let place = Place::new(with_files());
    place.hub.change(|b| {
        let config = br#"{"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox"}"#;
        b.files.insert("config.json".into(), config.to_vec());
    });
    fail(&mut place.pull(), 1, &["architecture", "GPTNeoXForCausalLM", "LlamaForCausalLM"]);
    assert!(place.hub.asked().iter().all(|a| !a.path.contains(WEIGHTS)), "gigabytes for nothing");
    place.hub.change(|b| drop(b.files.remove(WEIGHTS)));
    fail(&mut place.pull(), 1, &["has no model.safetensors", "safetensors"]);
    place.hub.change(|b| drop(b.files.remove("tokenizer.json")));
    fail(&mut place.pull(), 1, &["has no tokenizer.json"]);
}

#[test]
fn two_pulls_at_once_fetch_once() {
    let place = Place::new(Behaviour { hold: Some(WEIGHTS), ..with_files() });
    let first = place.pull().stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let partial = place.blob(WEIGHTS, ".incomplete");
    eventually("the first one is in the middle", || std::fs::metadata(&partial).is_ok_and(|m| m.len() > 0));
    let told = place.dir.path().join("second");
    let output = std::fs::File::create(&told).unwrap();
    let mut second = place.pull().stdout(output).spawn().unwrap();
    eventually("the second one waits", || std::fs::read_to_string(&told).unwrap().contains("\"waiting\""));
    place.hub.release();
    assert!(first.wait_with_output().unwrap().status.success());
    assert!(second.wait().unwrap().success());
    let fetched = place.hub.asked().iter().filter(|a| a.path == format!("/storage/{WEIGHTS}")).count();
    assert_eq!(fetched, 1);
    let report = std::fs::read_to_string(&told).unwrap();
    let report: Value = serde_json::from_str(report.lines().last().unwrap()).unwrap();
    assert_eq!(state(&report, WEIGHTS), "cached");
}

#[test]
fn offline_only_the_cache_is_asked() {
    let place = Place::new(with_files());
    let offline = |words: &[&str]| {
        let mut command = place.quire(words);
        command.env("HF_HUB_OFFLINE", "1");
        command
    };
    let parts = ["test/model", "HF_HUB_OFFLINE", "quire pull test/model"];
    fail(&mut offline(&["pull", "test/model"]), 1, &parts);
    fail(&mut offline(&["ingest", ".", "--model", "test/model"]), 1, &parts);
    assert!(place.hub.asked().is_empty());
    let online = place.pulled();
    place.hub.asked();
    let report: Value = serde_json::from_str(&succeed(&mut offline(&["pull", "test/model", "--json"]))).unwrap();
    assert!(place.hub.asked().is_empty());
    assert_eq!((&report["folder"], &report["commit"]), (&online["folder"], &online["commit"]));
    assert_eq!(report["files"].as_array().unwrap().len(), online["files"].as_array().unwrap().len());
}

/// Each finds what the other fetched, and the peer takes the hub of this test for one.
#[test]
fn the_python_library_of_the_hub_agrees() {
    let python = python("huggingface_hub");
    let place = Place::new(with_files());
    let peer = |home: &str, arguments: &str| {
        let script = "import sys, huggingface_hub as h; print(h.snapshot_download('test/model', ";
        let mut command = Command::new(&python);
        clean(&mut command, &place.dir.path().join("data"));
        command.arg("-c").arg(format!("{script}{arguments}))"));
        command.env("HF_HOME", place.dir.path().join(home)).env("HF_ENDPOINT", place.hub.endpoint());
        command.env("HF_HUB_DISABLE_TELEMETRY", "1").env("HF_HUB_DISABLE_PROGRESS_BARS", "1");
        succeed(&mut command).trim().to_string()
    };
    place.pulled();
    place.hub.asked();
    assert_eq!(peer("home", "local_files_only=True"), place.snapshot().display().to_string());
    assert!(place.hub.asked().is_empty());

    let theirs = peer("other", "allow_patterns=['*.json', '*.safetensors']");
    let mut ours = place.quire(&["pull", "test/model", "--json"]);
    let report = succeed(ours.env("HF_HOME", place.dir.path().join("other")).env("HF_HUB_OFFLINE", "1"));
    let report: Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["folder"].as_str().unwrap(), theirs);
    // The same names of blobs: a second pull on top fetches nothing.
    let mut ours = place.quire(&["pull", "test/model", "--json"]);
    let report = succeed(ours.env("HF_HOME", place.dir.path().join("other")));
    let report: Value = serde_json::from_str(report.lines().last().unwrap()).unwrap();
    assert!(report["files"].as_array().unwrap().iter().all(|file| file["state"] == "cached"), "{report}");
}

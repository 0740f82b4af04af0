//! A disk that fails below the whole program: full, with errors, or without power. The library that does it is
//! `tests/faults/faults.c`; `quire-bench crash` holds the long drills.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::process::Command;

use eval::FailingDisk;
use eval::failing_disk::op;
use serde_json::{Value, json};
use support::{Server, bench, eventually, example, python, quire, succeed};

/// A program that writes as programs do, so that the journal can be held against what must be left.
const WRITER: &str = r#"
import os, sys
root = sys.argv[1]
def write(name, text, sync=True, mode=os.O_CREAT | os.O_WRONLY | os.O_APPEND):
    fd = os.open(f"{root}/{name}", mode, 0o600)
    os.write(fd, text.encode())
    if sync: os.fsync(fd)
    os.close(fd)
def sync_folder(name=""):
    fd = os.open(f"{root}/{name}", os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
write("durable", "synced")
write("replaced", "old")
write("removed", "was here")
write("moved", "stays")
sync_folder()
write("durable", " and lost", sync=False)
write("unnamed", "no sync of the folder")
write("new", "new")
os.rename(f"{root}/new", f"{root}/replaced")
os.unlink(f"{root}/removed")
os.rename(f"{root}/moved", f"{root}/elsewhere")
os.mkdir(f"{root}/folder")
write("folder/inner", "x")
sync_folder("folder")
print("all written", flush=True)
write("durable", "never")
"#;

fn written(root: &Path) -> Vec<(String, String)> {
    let mut found: Vec<_> = std::fs::read_dir(root)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            (name, std::fs::read_to_string(&path).unwrap_or_else(|_| "a folder".into()))
        })
        .collect();
    found.sort();
    found
}

fn writer(disk: &FailingDisk, root: &Path) -> Command {
    let mut command = Command::new(python("os"));
    command.args(["-c", WRITER]).arg(root);
    disk.below(&mut command);
    command
}

#[test]
fn a_power_failure_takes_what_was_not_synced_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    std::fs::create_dir(&root).unwrap();
    let disk = FailingDisk::new(dir.path(), &root, true).unwrap();
    disk.kill_at(0).unwrap();
    assert!(writer(&disk, &root).status().unwrap().success());
    let operations = disk.operations().unwrap();
    std::fs::remove_dir_all(&root).unwrap();
    std::fs::create_dir(&root).unwrap();

    // In its last write: all but that has been done.
    disk.kill_at(operations - 1).unwrap();
    let output = writer(&disk, &root).output().unwrap();
    assert!(output.status.code().is_none() && output.stdout == b"all written\n", "{output:?}");
    let expected = [("durable", "synced"), ("moved", "stays"), ("removed", "was here"), ("replaced", "old")];
    assert_eq!(written(&root), expected.map(|(name, text)| (name.to_string(), text.to_string())));
}

#[test]
fn a_full_disk_takes_what_fits_until_it_is_mended() {
    let dir = tempfile::tempdir().unwrap();
    let disk = FailingDisk::new(dir.path(), dir.path(), false).unwrap();
    let code = r#"
import os, sys
fd = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY)
print(os.write(fd, b"x" * 100))
try: os.write(fd, b"y")
except OSError as error: print(error.errno)
"#;
    let run = |name: &str| {
        let mut command = Command::new(python("os"));
        command.args(["-c", code]).arg(dir.path().canonicalize().unwrap().join(name));
        disk.below(&mut command);
        succeed(&mut command)
    };
    disk.fail(op::WRITE, 28, 70).unwrap();
    assert_eq!(run("a"), "70\n28\n");
    assert_eq!(disk.failed().unwrap(), 1);
    disk.mend().unwrap();
    assert_eq!(run("b"), "100\n");
}

/// The whole program on a disk that is full for a while: ingesting says so, the server answers all the same, and stores again once
/// there is space, without a restart.
#[test]
fn a_server_answers_on_a_full_disk_and_stores_again_once_there_is_space() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let example = example();
    succeed(quire(&data).args(["ingest", "--lazy"]).args(&example.documents));
    let chunks = || {
        let stats = succeed(quire(&data).args(["cache", "stats", "--json"]));
        let stats: Value = serde_json::from_str(stats.lines().last().unwrap()).unwrap();
        stats["chunks"].as_u64().unwrap()
    };
    let disk = FailingDisk::new(dir.path(), &data, false).unwrap();
    let log = dir.path().join("log");
    let mut command = quire(&data);
    command.args(["serve", "--port", "0", "--json"]).stderr(std::fs::File::create(&log).unwrap());
    disk.below(&mut command);
    let server = Server::from(&mut command);
    let ask = || {
        let messages = json!([{"role": "user", "content": example.question}]);
        let body = json!({"messages": messages, "temperature": 0, "quire": {"collection": "default"}});
        let answer = server.chat(&body).json();
        assert_eq!(answer["choices"][0]["message"]["content"].as_str().unwrap().trim(), example.answer, "{answer}");
    };
    disk.fail(op::SPACE, 28, 0).unwrap();
    ask();
    ask();
    eventually("the server says that it cannot store", || {
        std::fs::read_to_string(&log).unwrap().contains("could not be stored")
    });
    assert!(disk.failed().unwrap() > 0);
    assert_eq!(chunks(), 0);
    disk.mend().unwrap();
    eventually("chunks are stored again", || {
        ask();
        chunks() > 0
    });
    ask();
}

/// The names of the documents that there are.
fn listed(data: &Path) -> Vec<String> {
    let printed = succeed(quire(data).args(["ls", "--json"]));
    let line = |line: &str| serde_json::from_str::<Value>(line).unwrap();
    let name = |line: Value| line["names"][0].as_str().unwrap().rsplit('/').next().unwrap().to_string();
    printed.lines().map(line).map(name).collect()
}

/// The server below a disk of which the folder `below` fails, and its log.
fn server_below(dir: &Path, data: &Path, below: &Path) -> (FailingDisk, Server, std::path::PathBuf) {
    let disk = FailingDisk::new(dir, below, false).unwrap();
    let log = dir.join("log");
    let mut command = quire(data);
    command.args(["serve", "--port", "0", "--json"]).stderr(std::fs::File::create(&log).unwrap());
    disk.below(&mut command);
    (disk, Server::from(&mut command), log)
}

fn is_answered(server: &Server) {
    let example = example();
    let messages = json!([{"role": "user", "content": example.question}]);
    let body = json!({"messages": messages, "temperature": 0, "quire": {"collection": "default"}});
    let answer = server.chat(&body).json();
    assert_eq!(answer["choices"][0]["message"]["content"].as_str().unwrap().trim(), example.answer, "{answer}");
}

/// Documents come in by the socket and over HTTP while the disk is full for a while: what is refused is refused, answers go on, and
/// everything works again once there is space.
#[test]
fn a_server_whose_disk_is_full_for_a_while_takes_documents_again_and_loses_none() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    succeed(quire(&data).args(["ingest", "--lazy"]).args(&example().documents));
    let (disk, server, _log) = server_below(dir.path(), &data, &data);
    let note = |name: &str| {
        let path = dir.path().join(format!("{name}.txt"));
        std::fs::write(&path, format!("The buoy {name} lies off the pier, and a lamp burns on it.")).unwrap();
        path
    };
    let form = "--edge\r\nContent-Disposition: form-data; name=\"purpose\"\r\n\r\nassistants\r\n--edge\r\nContent-Disposition: \
                form-data; name=\"file\"; filename=\"upload.txt\"\r\n\r\nA pilot cutter.\r\n--edge--\r\n";
    let upload = || {
        let kind = [("content-type", "multipart/form-data; boundary=edge")];
        support::request(server.address, "POST", "/v1/files", &kind, form.as_bytes())
    };
    let post = |path: &str, body: Value| {
        let kind = [("content-type", "application/json")];
        support::request(server.address, "POST", path, &kind, body.to_string().as_bytes())
    };
    let mut acknowledged = listed(&data);
    succeed(quire(&data).arg("ingest").arg(note("before")));
    acknowledged.push("before.txt".into());
    for (round, after) in [0, 700, 9000].into_iter().enumerate() {
        disk.fail(op::SPACE, 28, after).unwrap();
        let name = format!("round{round}");
        // Until the disk is really full, some may be taken.
        for attempt in 0..6 {
            let name = format!("{name}-{attempt}");
            if quire(&data).args(["ingest", "--lazy"]).arg(note(&name)).output().unwrap().status.success() {
                acknowledged.push(format!("{name}.txt"));
            }
        }
        support::fail(quire(&data).arg("ingest").arg(note(&name)), 1, &["no storage space", "Free some space"]);
        let refused = [upload(), post("/v1/vector_stores", json!({"name": "x"}))];
        for refused in refused {
            assert_eq!(
                (refused.status, &refused.json()["error"]["code"]),
                (507, &json!("disk_full")),
                "{}",
                refused.text()
            );
        }
        is_answered(&server);
        assert!(succeed(quire(&data).args(["search", "buoy before"])).contains("before.txt"));
        assert!(acknowledged.iter().all(|name| listed(&data).contains(name)), "{acknowledged:?}");
        disk.mend().unwrap();
        succeed(quire(&data).arg("ingest").arg(note(&name)));
        acknowledged.push(format!("{name}.txt"));
        let file = upload().json()["id"].as_str().unwrap().to_string();
        let store = post("/v1/vector_stores", json!({"file_ids": [file]})).json()["id"].as_str().unwrap().to_string();
        let path = format!("/v1/vector_stores/{store}/files/{file}");
        eventually("the file is read", || server.get(&path).json()["status"] == "completed");
        is_answered(&server);
    }
    drop(server);
    let left = listed(&data);
    acknowledged.iter().for_each(|name| assert!(left.contains(name), "{name} was acknowledged: {left:?}"));
    assert!(succeed(quire(&data).args(["search", "buoy round1"])).contains("round1.txt"));
}

#[test]
fn a_server_that_starts_on_a_full_disk_serves_and_takes_commands_once_there_is_space() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    succeed(quire(&data).args(["ingest", "--lazy"]).args(&example().documents));
    let disk = FailingDisk::new(dir.path(), &data, false).unwrap();
    disk.fail(op::SPACE, 28, 0).unwrap();
    let log = dir.path().join("log");
    let mut command = quire(&data);
    command.args(["serve", "--port", "0", "--json"]).stderr(std::fs::File::create(&log).unwrap());
    disk.below(&mut command);
    let server = Server::from(&mut command);
    is_answered(&server);
    assert!(succeed(quire(&data).args(["search", "river"])).contains("characters"));
    assert!(!data.join("quire.sock").exists());
    disk.mend().unwrap();
    eventually("the server takes commands", || data.join("quire.sock").exists());
    std::fs::write(dir.path().join("note.txt"), "The lamp of Varn Point was lit in 1851.").unwrap();
    let report = succeed(quire(&data).args(["ingest", "note.txt"]));
    assert!(report.contains("all new") && report.contains("1 computed"), "{report}");
    assert!(server.metric("quire:commands_total") >= 1.0, "the server did it");
    assert!(succeed(quire(&data).args(["search", "lamp"])).contains("note.txt"));
}

/// No space and errors below the catalog alone, in its log and in its tables.
fn catalog_fails(errno: i32, part: &str) {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    succeed(quire(&data).args(["ingest", "--lazy"]).args(&example().documents));
    let (disk, server, _log) = server_below(dir.path(), &data, &data.join("catalog"));
    let mut acknowledged = listed(&data);
    for (round, after) in [0, 40, 900, 5000].into_iter().enumerate() {
        let name = format!("round{round}.txt");
        let text =
            format!("The buoy {round} lies off the pier. {}", "A lamp burns on it, and a bell rings. ".repeat(200));
        std::fs::write(dir.path().join(&name), text).unwrap();
        // Its log: cut at various places.
        disk.fail(op::WRITE | op::SYNC | op::CREATE, errno, after).unwrap();
        support::fail(quire(&data).args(["ingest", "--lazy", &name]), 1, &["catalog", part]);
        is_answered(&server);
        assert!(acknowledged.iter().all(|name| listed(&data).contains(name)));
        disk.mend().unwrap();
        succeed(quire(&data).args(["ingest", "--lazy", &name]));
        acknowledged.push(name);
    }
    // Its tables: they are written when space is reclaimed.
    succeed(quire(&data).args(["rm", "round0.txt"]));
    acknowledged.retain(|name| name != "round0.txt");
    for after in [0, 3000] {
        disk.fail(op::WRITE | op::SYNC | op::CREATE, errno, after).unwrap();
        support::fail(quire(&data).arg("reclaim"), 1, &["catalog"]);
        is_answered(&server);
        disk.mend().unwrap();
    }
    succeed(quire(&data).arg("reclaim"));
    std::fs::write(dir.path().join("after.txt"), "The last buoy.").unwrap();
    succeed(quire(&data).args(["ingest", "--lazy", "after.txt"]));
    acknowledged.push("after.txt".into());
    drop(server);
    let mut left = listed(&data);
    [&mut left, &mut acknowledged].into_iter().for_each(|names| names.sort());
    assert_eq!(left, acknowledged);
}

#[test]
fn a_catalog_whose_disk_is_full_for_a_while_loses_nothing_and_goes_on() {
    catalog_fails(28, "no storage space");
}

#[test]
fn a_catalog_whose_disk_has_errors_for_a_while_loses_nothing_and_goes_on() {
    catalog_fails(5, "Input/output error");
}

/// The table of texts is damaged under a server: documents come in and are found, and a repair on a full disk takes nothing away.
#[test]
fn a_damaged_catalog_is_repaired_through_a_server_once_there_is_space_and_serves_until_then() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    succeed(quire(&data).args(["ingest", "--lazy"]).args(&example().documents));
    // Everything goes into tables.
    succeed(quire(&data).arg("reclaim"));
    let tables = std::fs::read_dir(data.join("catalog")).unwrap().map(|entry| entry.unwrap().path());
    let tables = tables.filter(|path| path.extension().is_some_and(|ending| ending == "sst"));
    let texts = tables.max_by_key(|path| path.metadata().unwrap().len()).unwrap();
    std::fs::remove_file(&texts).unwrap();
    let doctor = succeed_or_not(quire(&data).arg("doctor"));
    assert!(doctor.contains("catalog") && doctor.contains("quire catalog verify"), "{doctor}");
    let (disk, server, _log) = server_below(dir.path(), &data, &data);
    let note = dir.path().join("note.txt");
    std::fs::write(&note, "The lamp of Varn Point was lit in 1851.").unwrap();
    succeed(quire(&data).args(["ingest", "--lazy"]).arg(&note));
    let finds = || assert!(succeed(quire(&data).args(["search", "Varn"])).contains("note.txt"));
    finds();
    let verified = quire(&data).args(["catalog", "verify"]).output().unwrap();
    let (stdout, stderr) = support::texts(&verified);
    assert!(
        !verified.status.success() && stdout.contains("--repair") | stderr.contains("--repair"),
        "{stdout}{stderr}"
    );
    assert!(!stdout.contains("note.txt") && !stderr.contains("note.txt"), "{stdout}{stderr}");
    for after in [0, 20_000] {
        disk.fail(op::SPACE, 28, after).unwrap();
        support::fail(
            quire(&data).args(["catalog", "verify", "--repair"]),
            1,
            &["disk is full", "nothing has changed"],
        );
        finds();
        disk.mend().unwrap();
        finds();
    }
    let names = listed(&data);
    let repaired = quire(&data).args(["catalog", "verify", "--repair"]).output().unwrap();
    let (stdout, stderr) = support::texts(&repaired);
    assert!(stdout.contains("written anew"), "{stdout}{stderr}");
    finds();
    succeed(quire(&data).args(["ingest", "--lazy"]).args(&example().documents));
    is_answered(&server);
    assert_eq!(listed(&data).len(), names.len());
    succeed(quire(&data).args(["catalog", "verify"]));
    drop(server);
    succeed(quire(&data).args(["catalog", "verify"]));
    assert!(!succeed(quire(&data).arg("doctor")).contains("catalog verify"));
}

/// Everything that a program has said, however it ended.
fn succeed_or_not(command: &mut Command) -> String {
    let (stdout, stderr) = support::texts(&command.output().unwrap());
    stdout + &stderr
}

fn drill(case: &str, kills: usize) -> Value {
    let dir = tempfile::tempdir().unwrap();
    let kills = kills.to_string();
    let words = ["crash", case, "--kills", &kills, "--seed", "7", "--no-records", "--json"];
    let printed = succeed(bench(&dir.path().join("data")).args(words));
    serde_json::from_str(printed.lines().last().unwrap()).unwrap()
}

#[test]
fn a_library_survives_kills_in_the_middle_of_everything() {
    let report = drill("library/kill9", 8);
    assert_eq!((&report["kills"], &report["lost_or_wrong"]), (&8.into(), &0.into()), "{report}");
    assert!(report["documents_compared"].as_u64().unwrap() > 0, "{report}");
}

#[test]
fn a_library_survives_power_failures_that_drop_what_was_not_synced() {
    let report = drill("library/unsynced-dropped", 10);
    assert_eq!((&report["kills"], &report["lost_or_wrong"]), (&10.into(), &0.into()), "{report}");
    assert!(report["kills_opening"].as_u64().unwrap() > 0, "{report}");
}

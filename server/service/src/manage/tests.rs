#![allow(clippy::unwrap_used)]

use std::path::Path;

use documents::{Format, LanguageSetting, NewDocument, NewPassage, Span};

use super::*;

fn put(library: &Library, name: &str, text: &str) {
    let place = documents::ChunkSpan { chars: Span { start: 0, end: text.len() }, bytes: 0..text.len() };
    let document = NewDocument {
        name: name.into(),
        text: text.into(),
        format: Format::Text,
        fingerprint: "one".into(),
        tokenizer: Some([1; 32]),
        passages: vec![NewPassage { place, page: None, tokens: text.bytes().map(u32::from).collect() }],
        attributes: None,
        instead_of: Vec::new(),
        left_by: Vec::new(),
    };
    let collection = library.collection_or_new("notes").unwrap();
    collection.writer().unwrap().change(|t, info| t.put(info, &document)).unwrap();
}

/// What a command tells, as names, and whether it failed.
fn told(library: &Library, command: DocumentsCommand) -> (Vec<String>, bool) {
    let mut events = Vec::new();
    let done = manage_documents(library, &command, &|| Ok(0), &mut |event| {
        events.push(match event {
            DocumentsEvent::Document(document) => document.names.join("="),
            DocumentsEvent::Collection(sum) => format!("{} {}", sum.name, sum.documents),
            DocumentsEvent::Renamed { name, to } => format!("{name}>{to}"),
            DocumentsEvent::Removed { name } => format!("-{name}"),
            DocumentsEvent::RemovedCollection { name, id, documents, .. } => format!("{name} {id} {documents}"),
            DocumentsEvent::Restored { name, replaced } => format!("+{name}{}", if replaced { "!" } else { "" }),
            DocumentsEvent::Damaged { name, .. } => format!("!{name}"),
            DocumentsEvent::Failed { name, .. } => format!("?{name}"),
            DocumentsEvent::Reclaimed { collections, documents, .. } => format!("{collections} {documents}"),
        });
    });
    (events, done.is_err())
}

fn list() -> DocumentsCommand {
    DocumentsCommand::List { collection: "notes".into() }
}

fn names(names: &[&str]) -> Vec<DocumentName> {
    names.iter().map(|name| DocumentName { given: (*name).into(), paths: vec![format!("/d/{name}")] }).collect()
}

fn remove(what: &[&str], now: bool) -> DocumentsCommand {
    DocumentsCommand::Remove { collection: "notes".into(), names: names(what), now }
}

fn restore(what: &[&str]) -> DocumentsCommand {
    DocumentsCommand::Restore { collection: "notes".into(), names: names(what) }
}

fn found(library: &Library, query: &str) -> usize {
    library.search("notes", query, 10).unwrap().len()
}

#[test]
fn documents_are_listed_removed_by_path_name_or_id_and_restored() {
    let dir = tempfile::tempdir().unwrap();
    let library = Library::new(dir.path());
    for (name, text) in [("/d/a", "One lamp."), ("/d/b", "Two lamps."), ("c", "Two lamps."), ("/d/e", "A pilot.")] {
        put(&library, name, text);
    }
    assert_eq!(told(&library, list()), (vec!["/d/a".into(), "/d/b=c".into(), "/d/e".into()], false));
    assert_eq!(told(&library, DocumentsCommand::Collections), (vec!["notes 3".into()], false));
    // By path, one of two names, a name that stands for nothing, and an id.
    let id = library.collection("notes").unwrap().document_info("/d/e").unwrap().unwrap().id.to_string();
    let removed = told(&library, remove(&["a", "c", "x", &id], false));
    assert_eq!(removed, (vec!["-a".into(), "-c".into(), "?x".into(), format!("-{id}")], true));
    assert_eq!((told(&library, list()).0, found(&library, "lamp pilot")), (vec!["/d/b".to_string()], 1));
    assert_eq!(told(&library, restore(&["a", "c", "e", "x"])).0, ["+a", "+c", "+e", "?x"]);
    assert_eq!(
        (told(&library, list()).0, found(&library, "lamp pilot")),
        (vec!["/d/a".into(), "/d/b=c".into(), "/d/e".to_string()], 3)
    );
    assert_eq!(told(&library, remove(&[], false)), (vec!["-notes".into()], false));
    assert!(library.collection("notes").is_err());
    assert_eq!(told(&library, restore(&[])).0, ["+notes"]);
    assert_eq!(found(&library, "lamp pilot"), 3);
    assert_eq!(told(&library, remove(&["a"], false)).0, ["-a"]);
    assert_eq!(told(&library, DocumentsCommand::Reclaim).0, ["0 1"]);
    assert_eq!(told(&library, restore(&["a"])), (vec!["?a".into()], true));
}

#[test]
fn removing_for_good_leaves_what_was_removed_before_to_be_restored() {
    let dir = tempfile::tempdir().unwrap();
    let library = Library::new(dir.path());
    put(&library, "/d/a", "One lamp.");
    put(&library, "/d/b", "Two lamps.");
    told(&library, remove(&["a"], false));
    assert_eq!(told(&library, remove(&["b"], true)), (vec!["-b".into()], false));
    assert_eq!(told(&library, restore(&["a", "b"])).0, ["+a", "?b"]);
    assert_eq!(told(&library, remove(&[], true)), (vec!["-notes".into()], false));
    assert_eq!(told(&library, restore(&[])), (vec![], true));
}

#[test]
fn collections_of_one_name_that_were_removed_one_after_the_other_all_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let library = Library::new(dir.path());
    let restore = |collection: &str| {
        told(&library, DocumentsCommand::Restore { collection: collection.into(), names: Vec::new() })
    };
    for (name, text) in [("/d/a", "One lamp."), ("/d/b", "Two lamps."), ("/d/c", "A pilot.")] {
        put(&library, name, text);
        assert_eq!(told(&library, remove(&[], false)).0, ["-notes"]);
    }
    let all = ["notes removed-1 1", "notes removed-2 1", "notes removed-3 1"];
    assert_eq!(told(&library, DocumentsCommand::Removed).0, all);
    // The last one by its name, and those that are left are told.
    assert_eq!(restore("notes"), (vec!["+notes".into(), all[0].into(), all[1].into()], false));
    assert_eq!(told(&library, list()).0, ["/d/c"]);
    let taken = library.writable().unwrap().restore_collection("removed-1").unwrap_err().to_string();
    assert!(taken.contains("quire collections rename notes"), "{taken}");
    told(&library, remove(&[], false));
    assert_eq!(restore("removed-1").0[0], "+notes");
    assert_eq!((told(&library, list()).0, found(&library, "lamp")), (vec!["/d/a".to_string()], 1));
    assert_eq!(restore("removed-7"), (vec![], true));
}

/// Whether any file below `dir` has these bytes.
fn is_anywhere(dir: &Path, marker: &[u8]) -> Option<std::path::PathBuf> {
    std::fs::read_dir(dir).unwrap().flatten().find_map(|entry| match entry.path() {
        path if path.is_dir() => is_anywhere(&path, marker),
        path => std::fs::read(&path).unwrap().windows(marker.len()).any(|bytes| bytes == marker).then_some(path),
    })
}

#[test]
fn no_byte_of_what_is_removed_for_good_is_left_in_the_data_folder() {
    // Words that nothing compresses (lz4 keeps what does not repeat as it is), as the index has them too: in lower case.
    let marker = "kq7zv9x1mw4tj8rb2nd6hp3y";
    let other = "u5gs0fqe8zk4vx9bn1wj7mtc";
    let name = "/d/a-wr6cj2ue0ot9";
    type Remove = fn(&Library);
    let ways: [(&str, Remove); 4] = [
        ("rm --now", |library| drop(told(library, remove(&["a-wr6cj2ue0ot9"], true)))),
        ("reclaim", |library| {
            told(library, remove(&["a-wr6cj2ue0ot9"], false));
            told(library, DocumentsCommand::Reclaim);
        }),
        ("rm --now of a collection", |library| {
            put(library, "/d/a-wr6cj2ue0ot9", "something else");
            library.collection_or_new("kept").unwrap();
            told(library, remove(&["b"], false));
            told(library, remove(&[], true));
        }),
        ("another text, then reclaim", |library| {
            put(library, "/d/a-wr6cj2ue0ot9", "Another text.");
            told(library, DocumentsCommand::Reclaim);
        }),
    ];
    for (way, remove) in ways {
        let dir = tempfile::tempdir().unwrap();
        let library = Library::new(dir.path());
        put(&library, "/d/b", &format!("A harbour. {other}"));
        put(&library, name, &format!("A lighthouse. {marker}"));
        library.erase().unwrap();
        put(&library, "/d/c", "A pier.");
        assert!(is_anywhere(dir.path(), marker.as_bytes()).is_some(), "the search finds what is there");
        assert_eq!(found(&library, marker), 1);
        remove(&library);
        assert_eq!(is_anywhere(dir.path(), marker.as_bytes()), None, "{way}");
        if !way.starts_with("another text") {
            assert_eq!(is_anywhere(dir.path(), &name.as_bytes()[3..]), None, "{way}: its name");
        }
        let whole = way.ends_with("collection");
        assert!(whole || is_anywhere(dir.path(), other.as_bytes()).is_some(), "{way}");
        drop(library);
        assert_eq!(is_anywhere(dir.path(), marker.as_bytes()), None, "{way}, after closing");
        let reopened = Library::new(dir.path());
        assert!(whole || found(&reopened, marker) == 0 && found(&reopened, "harbour") == 1, "{way}");
    }
}

#[test]
fn a_collection_gets_another_name_unless_that_is_taken_or_it_is_a_stores_id() {
    let dir = tempfile::tempdir().unwrap();
    let library = Library::new(dir.path());
    let rename = |name: &str, to: &str| {
        let command = DocumentsCommand::Rename { collection: name.into(), to: to.into() };
        manage_documents(&library, &command, &|| Ok(0), &mut |_| {}).map_err(|error| error.to_string())
    };
    put(&library, "/d/a.txt", "One lamp.");
    assert_eq!(found(&library, "lamp"), 1);
    library.collection_or_new("other").unwrap();
    assert!(rename("notes", "other").unwrap_err().contains("`other` is there already"));
    rename("notes", "notes").unwrap();
    assert!(rename("notes", "../x").unwrap_err().contains("expected 1 to 64 letters"));
    assert!(rename("absent", "x").unwrap_err().contains("there are: notes, other"));
    rename("notes", "renamed").unwrap();
    assert_eq!(library.search("renamed", "lamp", 5).unwrap().len(), 1);
    assert!(library.search("notes", "lamp", 5).is_err());
    // What is taken out of it under one name comes back under another one.
    let removed = DocumentsCommand::Remove { collection: "renamed".into(), names: names(&["a.txt"]), now: false };
    assert_eq!(told(&library, removed).0, ["-a.txt"]);
    rename("renamed", "notes").unwrap();
    assert_eq!(told(&library, restore(&["a.txt"])).0, ["+a.txt"]);
    assert_eq!((found(&library, "lamp"), library.collections().unwrap().len()), (1, 2));
    put(&library, "/d/b.txt", "Two lamps.");
    assert_eq!(found(&library, "lamp"), 2);
    // A removed one comes back once the new one of its name is called otherwise, as the message says.
    assert_eq!(told(&library, remove(&[], false)).0, ["-notes"]);
    put(&library, "/d/c.txt", "Three lamps.");
    let refused = manage_documents(&library, &restore(&[]), &|| Ok(0), &mut |_| {}).unwrap_err().to_string();
    assert!(refused.contains("quire collections rename notes NEW_NAME"), "{refused}");
    rename("notes", "newer").unwrap();
    assert_eq!(told(&library, restore(&[])).0, ["+notes"]);
    assert_eq!((found(&library, "lamp"), library.search("newer", "lamp", 5).unwrap().len()), (2, 1));
    let store = crate::ids::new_id("vs_");
    library.collection_or_new(&store).unwrap();
    assert!(rename(&store, "x").unwrap_err().contains("POST /v1/vector_stores/vs_"));
}

#[test]
fn nothing_comes_into_a_collection_that_was_removed_meanwhile() {
    let dir = tempfile::tempdir().unwrap();
    let library = Library::new(dir.path());
    put(&library, "/d/a", "One lamp.");
    let open = library.collection("notes").unwrap();
    let writer = open.writer().unwrap();
    told(&library, remove(&[], false));
    // Also where the name has been given again.
    library.collection_or_new("notes").unwrap();
    let late = writer.change(|transaction, info| transaction.remove_name(info, "/d/a"));
    let error = late.unwrap_err().to_string();
    assert!(error.contains("collection `notes` was removed") && error.contains("--undo"), "{error}");
    assert_eq!(library.catalog().unwrap().unwrap().totals(open.info().id).unwrap().documents, 1);
}

#[test]
fn a_name_is_found_as_lists_show_it() {
    let dir = tempfile::tempdir().unwrap();
    let library = Library::new(dir.path());
    let odd = dir.path().canonicalize().unwrap().join("bell\u{7}\nof \\u{x}\u{202e}.txt");
    put(&library, odd.to_str().unwrap(), "One lamp.");
    let shown =
        odd.to_str().unwrap().replace('\u{7}', "\\u{7}").replace('\n', "\\u{a}").replace('\u{202e}', "\\u{202e}");
    let named = |now| {
        let collection = "notes".to_string();
        let names = vec![DocumentName::here(&shown)];
        if now {
            DocumentsCommand::Remove { collection, names, now: false }
        } else {
            DocumentsCommand::Restore { collection, names }
        }
    };
    assert_eq!(told(&library, named(true)), (vec![format!("-{shown}")], false));
    assert_eq!(told(&library, named(false)), (vec![format!("+{shown}")], false));
    // A file that is really called so comes first.
    put(&library, &shown, "Two lamps.");
    assert_eq!(told(&library, named(true)), (vec![format!("-{shown}")], false));
    assert_eq!(told(&library, list()).0, [odd.to_str().unwrap()]);
}

#[test]
fn a_document_that_was_removed_edited_and_taken_in_again_comes_back_and_says_what_made_way() {
    let dir = tempfile::tempdir().unwrap();
    let library = Library::new(dir.path());
    put(&library, "/d/a", "One lamp.");
    told(&library, remove(&["a"], false));
    put(&library, "/d/a", "A pilot.");
    assert_eq!(told(&library, restore(&["a"])), (vec!["+a!".into()], false));
    assert_eq!((found(&library, "lamp"), found(&library, "pilot")), (1, 0));
    assert_eq!(told(&library, restore(&["a"])), (vec!["+a!".into()], false));
    assert_eq!((found(&library, "lamp"), found(&library, "pilot")), (0, 1));
}

#[test]
fn a_name_means_what_it_means_in_the_current_folder() {
    let name = DocumentName::here("no/such/../file.txt");
    let here = std::env::current_dir().unwrap();
    assert_eq!((name.given.as_str(), name.paths.len()), ("no/such/../file.txt", 1));
    assert!(Path::new(&name.paths[0]).starts_with(here), "{name:?}");
    assert_eq!(LanguageSetting::Fixed("de".into()).to_string(), "de");
}

#![allow(clippy::unwrap_used)]
use std::cell::Cell;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use tantivy::schema::{IndexRecordOption, STORED, STRING, Schema, TextFieldIndexing, TextOptions};
use tantivy::{Index, IndexWriter, TantivyDocument};

use super::record::write_place;
use super::{Collection, Found};
use crate::error::DocumentsError;
use crate::ingest::Document;
use crate::split::{ChunkSpan, Format, Span};

/// A document whose lines are its chunks.
fn document(name: &str, text: &str) -> (Document, Vec<ChunkSpan>) {
    let mut chunks = Vec::new();
    let (mut byte, mut char) = (0, 0);
    for line in text.split_inclusive('\n') {
        let chars = line.trim_end().chars().count();
        chunks.push(ChunkSpan {
            chars: Span { start: char, end: char + chars },
            bytes: byte..byte + line.trim_end().len(),
        });
        byte += line.len();
        char += line.chars().count();
    }
    (Document { path: name.into(), text: text.into(), format: Format::Text }, chunks)
}

fn put(collection: &Collection, name: &str, text: &str) {
    let (document, chunks) = document(name, text);
    let mut writer = collection.writer().unwrap();
    writer.replace(&document, &format!("v{}", text.len()), &chunks).unwrap();
    writer.finish().unwrap();
}

fn search(collection: &Collection, query: &str, limit: usize) -> Vec<Found> {
    collection.search(query, limit, &|| true).unwrap()
}

fn passages(collection: &Collection, query: &str) -> Vec<String> {
    search(collection, query, 10).into_iter().map(|found| found.passage).collect()
}

/// A collection of documents with these texts, in a folder of its own.
fn collection(texts: &[&str]) -> (tempfile::TempDir, Collection) {
    let dir = tempfile::tempdir().unwrap();
    let collection = Collection::open_or_create(dir.path()).unwrap();
    let mut writer = collection.writer().unwrap();
    for (number, text) in texts.iter().enumerate() {
        let (document, chunks) = document(&format!("/d/{number}.txt"), text);
        writer.replace(&document, "v1", &chunks).unwrap();
    }
    writer.finish().unwrap();
    (dir, collection)
}

#[test]
fn found_passages_are_slices_of_the_stored_text() {
    let (_dir, collection) = collection(&[
        "Über den Fluß führt eine Brücke.\nThe lighthouse keepers counted ships.\n",
        "Nothing about towers here.\n",
    ]);
    let found = search(&collection, "lighthouse keeper", 5);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].passage, "The lighthouse keepers counted ships.");
    assert_eq!(found[0].path, PathBuf::from("/d/0.txt"));
    assert_eq!((found[0].span, found[0].line), (Span { start: 33, end: 70 }, 2));
}

#[test]
fn a_changed_document_replaces_its_chunks() {
    let dir = tempfile::tempdir().unwrap();
    let collection = Collection::open_or_create(dir.path()).unwrap();
    put(&collection, "/d/a.txt", "An anchor.\nOne barrel.\nOne compass.\n");
    put(&collection, "/d/b.txt", "An anchor too.\n");
    put(&collection, "/d/a.txt", "A dinghy.\n");
    assert_eq!(collection.records().unwrap(), 4);
    assert!(search(&collection, "barrel compass", 5).is_empty());
    assert_eq!(search(&collection, "anchor", 5).len(), 1);
    let stored = collection.document(Path::new("/d/a.txt")).unwrap().unwrap();
    assert_eq!((stored.text.as_str(), stored.chunks.len()), ("A dinghy.\n", 1));
    assert!(collection.document(Path::new("/d/c.txt")).unwrap().is_none());
}

#[test]
fn frequent_words_alone_find_passages_and_reopening_keeps_all() {
    let dir = tempfile::tempdir().unwrap();
    assert!(Collection::open(dir.path()).unwrap().is_none());
    put(&Collection::open_or_create(dir.path()).unwrap(), "/d/a.txt", "To be or not to be.\nA pilot.\n");
    let collection = Collection::open(dir.path()).unwrap().unwrap();
    assert_eq!(passages(&collection, "to be or not to be"), ["To be or not to be."]);
    assert_eq!(passages(&collection, "THE PILOTS AND ("), ["A pilot."]);
    assert!(search(&collection, "?! --", 5).is_empty() && search(&collection, "", 5).is_empty());
}

#[test]
fn a_second_writer_is_told_to_wait() {
    let (_dir, collection) = collection(&[]);
    let _first = collection.writer().unwrap();
    let error = collection.writer().err().unwrap().to_string();
    assert!(error.contains("Another quire is ingesting"), "{error}");
}

/// In each row, every query finds the text, and the last one of the row does not.
const SCRIPTS: &[(&str, &[&str], &str)] = &[
    // Chinese, Japanese
    (
        "阿明把备用钥匙放在第四四一七号储物柜里。图书馆每天早上九点开门，星期一休息。",
        &["备用钥匙", "图书馆", "图书", "柜", "九点"],
        "火车",
    ),
    ("予備の鍵は図書館の受付にあります。スペアキーです。", &["鍵", "図書館", "スペアキー", "ｽﾍﾟｱｷｰ", "受付"], "電車"),
    // Korean: words with and without particles, of several syllables and of one
    (
        "예비 열쇠는 도서관 안내 데스크에 있습니다. 도서관은 월요일에 쉽니다.",
        &["열쇠", "도서관", "열쇠가", "월요일"],
        "기차",
    ),
    ("책은 집에서 읽는다.", &["책", "책을", "집"], "물"),
    // Scripts of South-East Asia
    ("กุญแจสำรองอยู่ที่โต๊ะประชาสัมพันธ์ของห้องสมุด", &["กุญแจ", "ห้องสมุด"], "รถไฟ"),
    ("ກະແຈສຳຮອງຢູ່ທີ່ຫ້ອງສະໝຸດ", &["ກະແຈ", "ຫ້ອງສະໝຸດ"], "ລົດໄຟ"),
    ("សោរបម្រុងនៅបណ្ណាល័យ", &["សោរ", "បណ្ណាល័យ"], "រថភ្លើង"),
    ("အရန်သော့သည်စာကြည့်တိုက်တွင်ရှိသည်", &["သော့", "စာကြည့်တိုက်"], "ရထား"),
    // Accents, composed or not, or not typed
    (
        "The cafe\u{301} Zu\u{308}rich opens at seven. Her re\u{301}sume\u{301} is in drawer 12.",
        &["café", "cafe", "Zürich", "zurich", "ZÜRICH", "résumé", "resume"],
        "cave",
    ),
    ("The crème brûlée costs nine euros at Jalapeño House.", &["creme brulee", "cre\u{300}me", "jalapeno"], "crumb"),
    (
        "Łódź, Ærø, Đà Nẵng, Århus, ﬁne eﬀort, Straße",
        &["lodz", "łódź", "aero", "da nang", "arhus", "fine", "effort", "strasse", "STRASSE"],
        "line",
    ),
    // Characters that show nothing, full width, digits of other scripts
    (
        "The key\u{ad}board and the zero\u{200b}width space and a no\u{2060}break.",
        &["keyboard", "zero", "width", "nobreak"],
        "key",
    ),
    ("Ｔｈｅ ｋｅｙ ｉｓ ４４１７", &["key", "4417"], "441"),
    ("الخزانة رقم ٤٤١٧ في المكتبة", &["4417", "٤٤١٧", "۴۴۱۷", "४४१७", "４４１７"], "4418"),
    ("ตู้หมายเลข ๔๔๑๗", &["4417"], "4418"),
    // Arabic and Hebrew with and without marks, Arabic letters with variants, elongation, Persian endings
    ("مُحَمَّدٌ كَتَبَ الرِّسالَةَ إلى أحمد فى المـــدرسة", &["محمد", "كتب", "الرساله", "احمد", "في", "المدرسة", "مُحَمَّدٌ"], "قلم"),
    ("محمد كتب", &["مُحَمَّدٌ"], "قلم"),
    ("کتاب‌ها روی میز است", &["کتاب", "كتاب"], "قلم"),
    ("שָׁלוֹם עולם", &["שלום", "שָׁלוֹם"], "בוקר"),
    // Greek, Cyrillic, Devanagari
    ("Το κλειδί είναι στη βιβλιοθήκη. ΟΔΟΣ", &["κλειδι", "ΚΛΕΙΔΊ", "οδος"], "τρενο"),
    ("Ёлка стоит у моей двери.", &["елка", "ёлка", "дверь"], "поезд"),
    ("चाबी पुस्तकालय में है", &["चाबी", "पुस्तकालय"], "चबी"),
    // Long words, and symbols
    (
        "Checksum: ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ff of nine.",
        &[
            "ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ff",
            "AB12CD34AB12CD34AB12CD34AB12CD34AB12CD34AB12CD34AB12CD34AB12CD34AB12CD34AB12CD34AB12CD34AB12CD34AB12CD34AB12CD34AB12CD34AB12CD34FF",
        ],
        "ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34fe",
    ),
    ("Aprilia 🚲 for 40 €", &["🚲", "€"], "🚗"),
];

#[test]
fn words_of_all_scripts_are_found_however_they_are_typed() {
    for (text, queries, absent) in SCRIPTS {
        let (_dir, collection) = collection(&[text, "Something else."]);
        for query in *queries {
            assert_eq!(passages(&collection, query), [*text], "{query}");
        }
        assert_eq!(passages(&collection, absent), [""; 0], "{absent}");
    }
}

#[test]
fn a_collection_of_all_scripts_and_languages_loses_no_word() {
    let texts: Vec<&str> = SCRIPTS.iter().map(|(text, ..)| *text).collect();
    let (_dir, collection) = collection(&texts);
    for (text, queries, _) in SCRIPTS {
        for query in *queries {
            assert!(passages(&collection, query).contains(&text.to_string()), "{query}");
        }
    }
}

#[test]
fn the_form_that_was_typed_comes_first() {
    let (_dir, collection) = collection(&["A resume of it.", "A résumé of it.", "A resumed work."]);
    assert_eq!(passages(&collection, "résumé")[0], "A résumé of it.");
    assert_eq!(passages(&collection, "resume")[0], "A resume of it.");
    assert_eq!(passages(&collection, "resumed")[0], "A resumed work.");
}

#[test]
fn endings_are_those_of_each_documents_language() {
    let (_dir, collection) = collection(&[
        "Die Schlüssel der Bibliotheken liegen in den blauen Schränken neben der Tür, und niemand weiß davon.",
        "The libraries keep their spare keys in the blue cupboards beside the door, and nobody knows about it.",
        "Les bibliothèques gardent leurs clés dans les armoires bleues à côté de la porte, et personne ne le sait.",
        "Библиотеки хранят свои запасные ключи в синих шкафах рядом с дверью, и никто об этом не знает.",
        "Kütüphaneler yedek anahtarlarını kapının yanındaki mavi dolaplarda saklıyor ve bunu kimse bilmiyor.",
    ]);
    let first = |query: &str| search(&collection, query, 1).first().map(|found| found.path.display().to_string());
    for (query, document) in [
        ("Bibliothek", "/d/0.txt"),
        ("Schrank blau", "/d/0.txt"),
        ("library", "/d/1.txt"),
        ("cupboard", "/d/1.txt"),
        ("bibliothèque", "/d/2.txt"),
        ("armoire", "/d/2.txt"),
        ("clé bleue", "/d/2.txt"),
        ("библиотека", "/d/3.txt"),
        ("шкаф", "/d/3.txt"),
        ("anahtarlar", "/d/4.txt"),
    ] {
        assert_eq!(first(query).as_deref(), Some(document), "{query}");
    }
}

#[test]
fn equal_passages_leave_room_for_others() {
    let copy = "Where is the spare key of the lighthouse kept? Ask the desk about the spare key of the lighthouse.";
    let spaced = copy.replacen(' ', "  ", 3);
    let copies = format!("{copy}\n").repeat(300) + &spaced;
    let (_dir, collection) = collection(&[
        &copies,
        copy,
        "Notes of the keeper. The spare key is kept in locker 4417, behind the oil store.",
        "The lighthouse is white.",
    ]);
    let found = passages(&collection, "Where is the spare key of the lighthouse kept?");
    assert_eq!(found.len(), 3);
    assert!(found[1].contains("4417") && found[2].contains("white"), "{found:?}");
}

#[test]
fn a_passage_that_a_better_one_mostly_covers_is_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let collection = Collection::open_or_create(dir.path()).unwrap();
    let text = "alpha beacon charlie beacon delta echo foxtrot";
    let at = |start: usize, end: usize| ChunkSpan { chars: Span { start, end }, bytes: start..end };
    let mut writer = collection.writer().unwrap();
    let document = Document { path: "/d/a.txt".into(), text: text.into(), format: Format::Text };
    writer.replace(&document, "v", &[at(0, 27), at(6, 33), at(21, 46)]).unwrap();
    writer.finish().unwrap();
    let found = passages(&collection, "beacon");
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(found[1].starts_with("beacon delta"), "{found:?}");
}

#[test]
fn words_that_stand_together_count_more() {
    let (_dir, collection) = collection(&["The new harbour of the old town.", "The old harbour of the new town."]);
    assert!(passages(&collection, "old harbour")[0].starts_with("The old harbour"));
    assert!(passages(&collection, "new harbour")[0].starts_with("The new harbour"));
}

#[test]
fn the_rarest_words_of_a_long_query_decide() {
    let frequent: String = (0..100).map(|word| format!("c{word} ")).collect();
    let lines: String = (0..200).map(|line| format!("{frequent}line{line}\n")).collect();
    let (_dir, collection) = collection(&[&lines, "A needle."]);
    let found = search(&collection, &format!("{frequent}absent needle"), 300);
    // It would be missing if the first words were taken.
    assert!(found.iter().any(|found| found.passage == "A needle."));
    assert_eq!(found.len(), 201);
}

#[test]
fn a_search_ends_once_nobody_waits() {
    let (_dir, collection) = collection(&["One word.", "Two words."]);
    let query: String = (0..50_000).map(|i| format!("w{i} ")).collect();
    for asked in [0, 1, 3, 100] {
        let left = Cell::new(asked);
        let wanted = || {
            left.set(left.get() - 1);
            left.get() >= 0
        };
        let error = collection.search(&query, 5, &wanted).unwrap_err();
        assert!(matches!(error, DocumentsError::Cancelled), "{error}");
        assert_eq!(left.get(), -1, "it went on after nobody waited");
    }
}

/// An index as the program wrote it before indexes had versions.
fn write_first_version(dir: &Path, documents: &[(&str, &str)]) {
    let mut schema = Schema::builder();
    let name = schema.add_text_field("document", STRING);
    let path = schema.add_text_field("path", STRING | STORED);
    let fingerprint = schema.add_text_field("fingerprint", STORED);
    let body = schema.add_text_field("body", STORED);
    let words = TextFieldIndexing::default().set_tokenizer("default").set_index_option(IndexRecordOption::WithFreqs);
    let text = schema.add_text_field("text", TextOptions::default().set_indexing_options(words));
    let place = schema.add_text_field("place", STORED);
    let index = Index::create_in_dir(dir, schema.build()).unwrap();
    let mut writer: IndexWriter = index.writer_with_num_threads(1, 32 << 20).unwrap();
    for (at, content) in documents {
        let (document, chunks) = document(at, content);
        let mut whole = TantivyDocument::default();
        whole.add_text(name, at);
        whole.add_text(path, at);
        whole.add_text(fingerprint, format!("print of {at}"));
        whole.add_text(body, &document.text);
        whole.add_text(place, chunks.iter().map(write_place).collect::<Vec<_>>().join("\n"));
        writer.add_document(whole).unwrap();
        for chunk in &chunks {
            let mut record = TantivyDocument::default();
            record.add_text(path, at);
            record.add_text(text, &document.text[chunk.bytes.clone()]);
            record.add_text(place, write_place(chunk));
            writer.add_document(record).unwrap();
        }
        writer.commit().unwrap();
    }
    writer.wait_merging_threads().unwrap();
}

#[test]
fn an_index_of_an_earlier_version_is_built_again_from_its_texts() {
    let dir = tempfile::tempdir().unwrap();
    write_first_version(dir.path(), &[("/d/zh.txt", "图书馆每天开门。\nEnd.\n"), ("/d/b.txt", "The café.\n")]);
    assert!(super::has_index(dir.path()));
    // What a rebuild leaves that was killed.
    std::fs::create_dir(dir.path().join("index-2.partial")).unwrap();
    std::fs::write(dir.path().join("index-2.partial/meta.json"), "half").unwrap();
    for _ in 0..2 {
        let collection = Collection::open(dir.path()).unwrap().unwrap();
        assert_eq!(passages(&collection, "图书馆"), ["图书馆每天开门。"]);
        assert_eq!(passages(&collection, "cafe"), ["The café."]);
        let stored = collection.document(Path::new("/d/zh.txt")).unwrap().unwrap();
        assert_eq!((stored.fingerprint.as_str(), stored.chunks.len()), ("print of /d/zh.txt", 2));
        // The old files are gone.
        assert!(!dir.path().join("meta.json").exists());
        put(&collection, "/d/b.txt", "The café.\n");
        assert_eq!(passages(&collection, "cafe"), ["The café."]);
    }
}

#[test]
fn an_index_of_a_later_version_is_named_as_one() {
    let (dir, _) = collection(&["One."]);
    std::fs::rename(dir.path().join("index-2"), dir.path().join("index-3")).unwrap();
    let error = Collection::open(dir.path()).err().unwrap();
    assert!(matches!(error, DocumentsError::NewerCollection { found: 3, known: 2, .. }), "{error}");
    assert!(super::has_index(dir.path()));
}

/// Sets the access rights of a folder and all in it.
fn set_rights(dir: &Path, folder: u32, file: u32) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(dir, PermissionsExt::from_mode(folder | 0o300)).unwrap();
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        match entry.path() {
            path if path.is_dir() => set_rights(&path, folder, file),
            path => std::fs::set_permissions(path, PermissionsExt::from_mode(file)).unwrap(),
        }
    }
    std::fs::set_permissions(dir, PermissionsExt::from_mode(folder)).unwrap();
}

#[test]
fn a_folder_that_cannot_be_written_is_searched() {
    let (dir, written) = collection(&["One lighthouse."]);
    drop(written);
    let old = tempfile::tempdir().unwrap();
    write_first_version(old.path(), &[("/d/zh.txt", "One 图书馆, one lighthouse.\n")]);
    for folder in [dir.path(), old.path()] {
        set_rights(folder, 0o555, 0o444);
        // Nothing keeps the administrator from writing: then this is a search like any other.
        let read_only = std::fs::write(folder.join("probe"), "").is_err();
        let collection = Collection::open(folder).unwrap().unwrap();
        assert_eq!(search(&collection, "lighthouse", 5).len(), 1);
        if read_only {
            assert!(matches!(collection.writer().err().unwrap(), DocumentsError::DataDir { .. }));
        }
        set_rights(folder, 0o755, 0o644);
    }
}

/// Flips one bit of a file.
fn flip(path: &Path, bit: u64) {
    let mut file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.seek(SeekFrom::Start(bit / 8)).unwrap();
    file.read_exact(&mut byte).unwrap();
    byte[0] ^= 1 << (bit % 8);
    file.seek(SeekFrom::Start(bit / 8)).unwrap();
    file.write_all(&byte).unwrap();
}

/// The files of a collection's index, and how many bits they have.
fn files(dir: &Path) -> Vec<(PathBuf, u64)> {
    let entries = std::fs::read_dir(dir.join("index-2")).unwrap().flatten();
    let mut files: Vec<_> = entries.map(|entry| (entry.path(), entry.metadata().unwrap().len() * 8)).collect();
    files.retain(|(_, bits)| *bits > 0);
    files.sort();
    files
}

/// What is found is what was written, or nothing is found with an error. Says whether it was an error.
fn check_citations(collection: Result<&Collection, DocumentsError>, texts: &[(String, String)]) -> bool {
    let Ok(collection) = collection else { return true };
    let mut failed = false;
    for query in ["lighthouse keeper", "图书馆 钥匙", "locker 4417", "drawer"] {
        match collection.search(query, 50, &|| true) {
            Ok(found) => {
                for found in found {
                    let (_, text) = texts.iter().find(|(name, _)| Path::new(name) == found.path).unwrap();
                    let there: String = text.chars().skip(found.span.start).take(found.span.len()).collect();
                    assert_eq!(found.passage, there, "{query}");
                }
            }
            Err(error) => {
                assert!(matches!(error, DocumentsError::Index { .. }), "{error}");
                failed = true;
            }
        }
    }
    for (name, text) in texts {
        match collection.document(Path::new(name)) {
            Ok(Some(stored)) => assert_eq!(stored.text, *text),
            Ok(None) => {}
            Err(_) => failed = true,
        }
    }
    failed
}

#[test]
fn a_flipped_bit_never_cites_another_text() {
    let texts: Vec<(String, String)> = (0..6)
        .map(|i| (format!("/d/{i}.txt"), format!("The lighthouse keeper of tower {i} keeps the key in locker 441{i}.\n图书馆的备用钥匙在第{i}号储物柜里。\nThe drawer {i} is empty.\n")))
        .collect();
    let borrowed: Vec<&str> = texts.iter().map(|(_, text)| text.as_str()).collect();
    let (dir, collection) = collection(&borrowed);
    let files = files(dir.path());
    assert!(files.len() > 5);
    // A generator of Marsaglia's (xorshift), so that a failure comes again.
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    let stores: Vec<_> =
        files.iter().filter(|(path, _)| path.extension().is_some_and(|kind| kind == "store")).collect();
    let mut refused = 0;
    for round in 0..300 {
        // Half of them in the texts themselves.
        let (path, bits) = match round % 2 {
            0 => stores[random(stores.len() as u64) as usize],
            _ => &files[random(files.len() as u64) as usize],
        };
        let bit = random(*bits);
        flip(path, bit);
        let reopened = Collection::open(dir.path()).map(Option::unwrap);
        refused += usize::from(check_citations(reopened.as_ref().map_err(|_| DocumentsError::Cancelled), &texts));
        flip(path, bit);
    }
    // Texts may also change under one that is open. (Lengths that tantivy reads there would end the process: only the
    // checksums of closed files stand before them.)
    let mut changed = 0;
    for (path, _) in &stores {
        let bytes = std::fs::read(path).unwrap();
        let Some(at) = bytes.windows(17).position(|window| window == b"lighthouse keeper") else { continue };
        for bit in at as u64 * 8..(at as u64 + 17) * 8 {
            flip(path, bit);
            changed += usize::from(check_citations(Ok(&collection), &texts));
            flip(path, bit);
        }
    }
    assert!(changed > 100, "{changed} were noticed");
    assert!(refused > 200, "{refused} of 300 were noticed");
    let whole = Collection::open(dir.path()).unwrap().unwrap();
    assert!(!check_citations(Ok(&whole), &texts));
    assert_eq!(search(&whole, "lighthouse", 50).len(), 6);
}

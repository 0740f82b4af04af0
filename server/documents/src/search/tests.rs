#![allow(clippy::unwrap_used)]
use std::cell::Cell;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tantivy::schema::{IndexRecordOption, STORED, STRING, Schema, TextFieldIndexing, TextOptions};
use tantivy::{Index, IndexWriter, TantivyDocument};

use super::analyzer::VERSION;
use super::{Collection, Found, index_dir};
use crate::catalog::{LanguageSetting, NewDocument, NewPassage};
use crate::error::DocumentsError;
use crate::split::{ChunkSpan, Format, Limits, Span, split};
use crate::{Library, catalog_dir};

const NAME: &str = "notes";

/// A document whose lines are its passages.
fn document(name: &str, text: &str) -> NewDocument {
    let mut passages = Vec::new();
    let (mut byte, mut char) = (0, 0);
    for line in text.split_inclusive('\n') {
        let chars = line.trim_end().chars().count();
        let place =
            ChunkSpan { chars: Span { start: char, end: char + chars }, bytes: byte..byte + line.trim_end().len() };
        passages.push(NewPassage { place, page: None, tokens: Vec::new() });
        byte += line.len();
        char += line.chars().count();
    }
    NewDocument {
        name: name.into(),
        text: text.into(),
        format: Format::Text,
        fingerprint: "lines".into(),
        tokenizer: None,
        passages,
        attributes: None,
        instead_of: Vec::new(),
        left_by: Vec::new(),
    }
}

fn put(collection: &Collection, name: &str, text: &str) {
    put_all(collection, &[document(name, text)]);
}

fn put_all(collection: &Collection, documents: &[NewDocument]) {
    let writer = collection.writer().unwrap();
    let put =
        writer.change(|transaction, info| documents.iter().try_for_each(|d| transaction.put(info, d).map(|_| ())));
    put.unwrap();
}

fn search(collection: &Collection, query: &str, limit: usize) -> Vec<Found> {
    collection.search(query, limit, &|| true).unwrap()
}

fn passages(collection: &Collection, query: &str) -> Vec<String> {
    search(collection, query, 10).into_iter().map(|found| found.passage).collect()
}

/// The collection in a data folder.
fn open(dir: &Path) -> Result<Arc<Collection>, DocumentsError> {
    Library::new(dir).collection(NAME)
}

/// A collection of documents with these texts, in a folder of its own.
fn collection(texts: &[&str]) -> (tempfile::TempDir, Arc<Collection>) {
    let dir = tempfile::tempdir().unwrap();
    let collection = Library::new(dir.path()).collection_or_new(NAME).unwrap();
    let named = |(number, text): (usize, &&str)| document(&format!("/d/{number}.txt"), text);
    put_all(&collection, &texts.iter().enumerate().map(named).collect::<Vec<_>>());
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
    assert_eq!((found[0].span, found[0].line, found[0].number), (Span { start: 33, end: 70 }, 2, 1));
    assert_eq!(collection.document_info("/d/0.txt").unwrap().unwrap().id, found[0].id);
}

#[test]
fn a_changed_document_replaces_its_passages_and_keeps_its_id() {
    let (_dir, collection) = collection(&["An anchor.\nOne barrel.\nOne compass.\n", "An anchor too.\n"]);
    let id = collection.document_info("/d/0.txt").unwrap().unwrap().id;
    put(&collection, "/d/0.txt", "A dinghy.\n");
    assert_eq!(collection.indexed_passages().unwrap(), 2);
    assert!(search(&collection, "barrel compass", 5).is_empty());
    assert_eq!(search(&collection, "anchor", 5).len(), 1);
    let stored = collection.document(Path::new("/d/0.txt")).unwrap().unwrap();
    assert_eq!((stored.text.as_str(), stored.passages.len(), stored.info.id), ("A dinghy.\n", 1, id));
    assert!(collection.document(Path::new("/d/c.txt")).unwrap().is_none());
}

#[test]
fn frequent_words_alone_find_passages_and_reopening_keeps_all() {
    let (dir, written) = collection(&["To be or not to be.\nA pilot.\n"]);
    drop(written);
    let collection = open(dir.path()).unwrap();
    assert_eq!(passages(&collection, "to be or not to be"), ["To be or not to be."]);
    assert_eq!(passages(&collection, "THE PILOTS AND ("), ["A pilot."]);
    assert!(search(&collection, "?! --", 5).is_empty() && search(&collection, "", 5).is_empty());
    assert!(matches!(
        Library::new(dir.path()).collection("other").err().unwrap(),
        DocumentsError::UnknownCollection { .. }
    ));
}

#[test]
fn a_second_process_may_read_what_another_one_writes_and_is_told_to_wait_if_it_writes() {
    let (dir, first) = collection(&["One lamp."]);
    // Another opening of the same folder stands for another process: RocksDB does not tell them apart.
    let other = Library::new(dir.path());
    assert_eq!(passages(&other.collection(NAME).unwrap(), "lamp"), ["One lamp."]);
    let error = other.collection_or_new(NAME).err().unwrap();
    assert!(matches!(error, DocumentsError::CatalogInUse { .. }), "{error}");
    put(&first, "/d/1.txt", "Two lamps.");
    assert_eq!(search(&open(dir.path()).unwrap(), "lamp", 5).len(), 2);
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
    ("ᥘᥣᥢᥲᥔᥤᥖᥥᥛᥬᥰᥙᥫᥢᥴ", &["ᥘᥣᥢᥲ", "ᥔᥤᥖᥥ", "ᥙᥫᥢᥴ"], "ᥐᥣᥭ"),
    ("ᦂᦳᧃᦺᦑᦟᦹᧉᦵᦙᦲᧂ", &["ᦂᦳᧃ", "ᦺᦑ", "ᦵᦙᦲᧂ"], "ᦃᦣᦱ"),
    ("ᨣᩤᩴᨾᩮᩬᩥᨦᩃ᩶ᩣ᩠ᨶᨶᩣ", &["ᨣᩤᩴᨾᩮᩬᩥᨦ", "ᩃ᩶ᩣ᩠ᨶᨶᩣ"], "ᨠᩣᨿ"),
    ("ꪼꪕꪒꪾꪁꪫꪱꪣ", &["ꪼꪕꪒꪾ", "ꪁꪫꪱꪣ"], "ꪵꪀ"),
    // Java, Bali, Sumatra, Sulawesi
    ("ꦲꦏ꧀ꦱꦫꦗꦮꦲꦤꦕꦫꦏ", &["ꦲꦏ꧀ꦱꦫ", "ꦗꦮ", "ꦲꦤꦕꦫꦏ"], "ꦧꦭꦶ"),
    ("ᬅᬓ᭄ᬱᬭᬩᬮᬶᬳᬦᬘᬭᬓ", &["ᬅᬓ᭄ᬱᬭ", "ᬩᬮᬶ"], "ᬚᬯ"),
    ("ᯘᯮᯒᯖ᯲ᯅᯖᯂ᯲", &["ᯘᯮᯒᯖ᯲", "ᯅᯖᯂ᯲"], "ᯀᯞ"),
    ("ᨒᨚᨈᨑᨕᨘᨁᨗ", &["ᨒᨚᨈᨑ", "ᨕᨘᨁᨗ"], "ᨅᨔ"),
    // Syllables, and scripts of the ancients
    ("ꆈꌠꁱꂷꌠꊈꊉ", &["ꆈꌠ", "ꁱꂷ", "ꊈ"], "ꀉꀊ"),
    ("ꕙꔤꖢꗡꘂ", &["ꕙꔤ", "ꖢꗡ"], "ꔀꔁ"),
    ("𗼇𗉘𘝞𗖰", &["𗼇𗉘", "𘝞"], "𗀀"),
    ("𒀭𒂗𒆤𒈗𒆳𒆳𒊏", &["𒂗𒆤", "𒈗", "𒆳𒆳"], "𒁀"),
    ("𓇋𓏠𓈖𓂋𓂝𓅱", &["𓇋𓏠𓈖", "𓂋𓂝"], "𓀀"),
    ("བོད་ཀྱི་སྐད་ཡིག་སློབ་དེབ།", &["སྐད་ཡིག", "བོད", "སློབ་དེབ་", "ཡིག"], "རྒྱ"),
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
    ("کتاب‌ها روی میز است", &["کتاب", "كتاب", "کتابها", "کتاب ها", "كتابها"], "قلم"),
    ("من به خانه می‌روم.", &["می‌روم", "میروم", "می روم", "ميروم", "خانه", "روم"], "آمد"),
    ("من به خانه میروم.", &["می‌روم", "میروم", "می روم", "می\u{200c}\u{200c}روم"], "آمد"),
    ("من به خانه می روم.", &["می‌روم", "میروم", "می روم", "مي روم"], "آمد"),
    ("خانه‌ی بزرگ‌ترین‌ها", &["خانه‌ی", "خانهی", "خانه ی", "بزرگترینها", "بزرگ ترین ها", "بزرگترین"], "آمد"),
    ("بزرگترینها", &["بزرگ‌ترین‌ها", "بزرگ ترین ها", "بزرگترینها"], "آمد"),
    ("نمی‌ دانم", &["نمی‌دانم", "نمیدانم"], "آمد"),
    ("Auf\u{200c}lage क्\u{200c}ष", &["Auflage", "auf\u{200c}lage", "क्ष"], "lage"),
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
        "ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ab12cd3eab12cd34ab12cd34ab12cd34ab12cd34ab12cd34ff",
    ),
    (
        "Key ab12cd34ef56ab78cd90ef12ab34cd56ef78ab90/Xq7LmZ0pTkW3vR9sYb2NaK+c4H of it.",
        &[
            "ab12cd34ef56ab78cd90ef12ab34cd56ef78ab90/Xq7LmZ0pTkW3vR9sYb2NaK+c4H",
            "34ef56ab78cd90ef12ab/",
            "xq7lmz0ptkw3vr9syb",
        ],
        "77ef00ab11cd22ef33ab",
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

/// A kind of words without end, each made of a seed.
type Endless = (&'static str, fn(u32) -> String);

const LONG: [Endless; 4] = [
    ("bases", |seed| drawn(seed, &["a", "c", "g", "t"])),
    ("base64", |seed| drawn(seed, &["A", "b", "9", "x", "Q", "7", "m", "Z", "k", "0", "R"])),
    ("compound", |seed| drawn(seed, &["Donau", "dampf", "schiff", "fahrts", "gesell", "schäfts", "Küchen", "straße"])),
    ("greek", |seed| drawn(seed, &["άλφα", "βῆτα", "γάμμα", "δέλτα", "ος"])),
];

fn drawn(seed: u32, parts: &[&str]) -> String {
    let mut state = seed;
    (0..700)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            parts[(state >> 16) as usize % parts.len()]
        })
        .collect()
}

#[test]
fn a_word_longer_than_a_passage_is_found_by_all_of_it_and_by_whatever_part_is_pasted() {
    for (kind, word) in LONG {
        let (word, other) = (word(1), word(2));
        for overlap in [0, 20] {
            let letters = |text: &str| -> Result<usize, std::convert::Infallible> { Ok(text.chars().count()) };
            let text = format!("Before it.\n\nSample {word}, and the end of it.");
            let limits = Limits { tokens: 120, overlap };
            let split = |text: &str| -> NewDocument {
                let places = split(text, Format::Text, limits, &letters).unwrap();
                let passages = places.into_iter().map(|place| NewPassage { place, page: None, tokens: Vec::new() });
                NewDocument { passages: passages.collect(), ..document("", text) }
            };
            let (_dir, collection) = collection(&[]);
            let named = |name: &str, text: &str| NewDocument { name: name.into(), ..split(text) };
            let documents = [named("/d/0.txt", &text), named("/d/1.txt", &format!("Sample {other}, and the end."))];
            assert!(documents[0].passages.len() > 5, "it is in one passage");
            put_all(&collection, &documents);
            let documents_of = |query: &str| -> Vec<String> {
                let found = search(&collection, query, 3);
                found.iter().map(|found| found.path.display().to_string()).collect()
            };
            assert_eq!(documents_of(&word), ["/d/0.txt"; 3], "{kind}");
            assert_eq!(documents_of(&word.to_uppercase())[0], "/d/0.txt", "{kind}");
            assert_eq!(documents_of(&other)[0], "/d/1.txt", "{kind}");
            let chars: Vec<char> = word.chars().collect();
            for start in (0..chars.len() - 60).step_by(37) {
                let part: String = chars[start..start + 40].iter().collect();
                let found = search(&collection, &part, 4);
                let place = text[..text.find(&part).unwrap()].chars().count();
                let is_there = |found: &Found| {
                    found.path == Path::new("/d/0.txt") && found.span.start < place + 40 && place < found.span.end
                };
                assert!(found.iter().any(is_there), "{kind}: {part} is not found");
            }
            assert_eq!(documents_of("before it")[0], "/d/0.txt", "{kind}");
        }
    }
}

#[test]
fn a_word_across_the_edge_of_two_passages_is_found_in_both_and_a_pair_in_the_first() {
    let (_dir, collection) = collection(&[]);
    let put_cut = |name: &str, text: &str, cut: usize| {
        let at = |chars: std::ops::Range<usize>| {
            let byte = |char: usize| text.char_indices().nth(char).map_or(text.len(), |(at, _)| at);
            let place = ChunkSpan {
                bytes: byte(chars.start)..byte(chars.end),
                chars: Span { start: chars.start, end: chars.end },
            };
            NewPassage { place, page: None, tokens: Vec::new() }
        };
        let passages = vec![at(0..cut), at(cut..text.chars().count())];
        put_all(&collection, &[NewDocument { passages, ..document(name, text) }]);
    };
    put_cut("/d/0.txt", "In the lighthouse.", 12);
    let mut found = passages(&collection, "lighthouse");
    found.sort();
    assert_eq!(found, ["In the light", "house."]);
    assert_eq!(passages(&collection, "house"), ["house."]);
    put_cut("/d/1.txt", "阿明在图书", 4);
    assert_eq!(passages(&collection, "图书"), ["阿明在图"]);
    put_cut("/d/2.txt", "Na\u{308}chste caf\u{e9}s", 2);
    assert_eq!(passages(&collection, "nächste").len(), 2);
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
    let (_dir, collection) = collection(&[]);
    let at = |start: usize, end: usize| {
        let place = ChunkSpan { chars: Span { start, end }, bytes: start..end };
        NewPassage { place, page: None, tokens: Vec::new() }
    };
    let text = "alpha beacon charlie beacon delta echo foxtrot";
    put_all(
        &collection,
        &[NewDocument { passages: vec![at(0, 27), at(6, 33), at(21, 46)], ..document("/d/a.txt", text) }],
    );
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

fn write_place(passage: &NewPassage) -> String {
    let ChunkSpan { chars, bytes } = &passage.place;
    format!("{} {} {} {}", chars.start, chars.end, bytes.start, bytes.end)
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
        let document = document(at, content);
        let places: Vec<String> = document.passages.iter().map(write_place).collect();
        let mut whole = TantivyDocument::default();
        whole.add_text(name, at);
        whole.add_text(path, at);
        whole.add_text(fingerprint, format!("print of {at}"));
        whole.add_text(body, &document.text);
        whole.add_text(place, places.join("\n"));
        writer.add_document(whole).unwrap();
        for (passage, written) in document.passages.iter().zip(&places) {
            let mut record = TantivyDocument::default();
            record.add_text(path, at);
            record.add_text(text, &document.text[passage.place.bytes.clone()]);
            record.add_text(place, written);
            writer.add_document(record).unwrap();
        }
        writer.commit().unwrap();
    }
    writer.wait_merging_threads().unwrap();
}

/// A data folder of the first version, with one collection.
fn first_version(documents: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let collection = dir.path().join("collections").join(NAME);
    std::fs::create_dir_all(&collection).unwrap();
    write_first_version(&collection, documents);
    dir
}

#[test]
fn collections_of_an_earlier_version_are_taken_into_the_catalog() {
    let dir = first_version(&[("/d/zh.txt", "图书馆每天开门。\nEnd.\n"), ("/d/b.md", "The café.\n")]);
    // What an import leaves that was killed.
    std::fs::create_dir(dir.path().join("catalog.partial")).unwrap();
    std::fs::write(dir.path().join("catalog.partial/CURRENT"), "half").unwrap();
    for _ in 0..2 {
        let collection = open(dir.path()).unwrap();
        assert_eq!(passages(&collection, "图书馆"), ["图书馆每天开门。"]);
        assert_eq!(passages(&collection, "cafe"), ["The café."]);
        let stored = collection.document(Path::new("/d/zh.txt")).unwrap().unwrap();
        assert_eq!((stored.info.fingerprint.as_str(), stored.passages.len()), ("print of /d/zh.txt", 2));
        assert_eq!(collection.document_info("/d/b.md").unwrap().unwrap().format, Format::Markdown);
        assert!(!dir.path().join("collections").exists(), "the old files are gone");
        let version = std::fs::read_to_string(dir.path().join("quire-data.json")).unwrap();
        assert!(version.contains("\"format\":2"), "an earlier program must not begin anew: {version}");
    }
}

/// What the committed folder of the first version has to have, wherever its texts are now.
fn check_first_folder(collections: [&Collection; 2]) {
    let [notes, zh] = collections;
    let names = notes.catalog().names(notes.info().id, None, 9).unwrap();
    let names: Vec<&str> = names.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["/notes/lamp.md", "/notes/replaced.txt", "/notes/turm.txt"]);
    let lamp = notes.document(Path::new("/notes/lamp.md")).unwrap().unwrap();
    assert!(lamp.text.ends_with("keeps the spare key in locker 4417.\n") && lamp.info.format == Format::Markdown);
    let found = search(notes, "locker 4417", 5);
    assert_eq!((found.len(), found[0].path.as_path(), found[0].line), (1, Path::new("/notes/lamp.md"), 5));
    assert_eq!(lamp.text[lamp.passages[1].place.bytes.clone()], found[0].passage);
    assert_eq!(passages(notes, "new text"), ["A new text that is there."]);
    assert_eq!(passages(notes, "bruecke brücke"), ["Der Turm wurde 1851 gebaut. Über den Fluß führt eine Brücke."]);
    assert_eq!(passages(zh, "图书馆"), ["图书馆每天早上九点开门。"]);
}

#[test]
fn the_committed_folder_of_the_first_version_keeps_all_of_its_texts() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/data-version-1");
    let dir = tempfile::tempdir().unwrap();
    copy(&fixture, dir.path());
    assert_eq!(crate::collection_names(dir.path()).unwrap(), ["library.zh", "notes"]);
    // As where nothing can be written: in memory, and not a byte changes.
    let before = listing(dir.path());
    let catalog = Arc::new(crate::Catalog::in_memory().unwrap());
    crate::collections::import(dir.path(), &catalog).unwrap();
    let in_memory = ["notes", "library.zh"].map(|name| {
        let info = catalog.collection(name).unwrap().unwrap();
        Collection::open(&catalog, &info, None, false).unwrap()
    });
    check_first_folder([&in_memory[0], &in_memory[1]]);
    let after = listing(dir.path());
    assert!(before.iter().all(|entry| entry.0.is_dir() || after.contains(entry)));
    for _ in 0..2 {
        let library = Library::new(dir.path());
        let opened = ["notes", "library.zh"].map(|name| library.collection(name).unwrap());
        check_first_folder([&opened[0], &opened[1]]);
        assert!(!dir.path().join("collections").exists());
    }
}

#[test]
fn a_collection_of_an_earlier_version_that_is_damaged_is_left_where_it_is_and_others_come_in() {
    let dir = first_version(&[("/d/a.txt", "One lamp.\n")]);
    let damaged = dir.path().join("collections/damaged");
    std::fs::create_dir(&damaged).unwrap();
    std::fs::write(damaged.join("meta.json"), "torn").unwrap();
    let library = Library::new(dir.path());
    assert_eq!(passages(&library.collection(NAME).unwrap(), "lamp"), ["One lamp."]);
    let names: Vec<_> = library.collections().unwrap().into_iter().map(|info| info.name).collect();
    assert_eq!(names, [NAME]);
    assert!(damaged.join("meta.json").exists() && !dir.path().join("collections").join(NAME).exists());
}

/// What lies in a folder, with contents and times.
fn listing(dir: &Path) -> Vec<(PathBuf, Vec<u8>, std::time::SystemTime)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        let path = entry.path();
        let changed = entry.metadata().unwrap().modified().unwrap();
        match path.is_dir() {
            true => {
                found.extend(listing(&path));
                found.push((path, Vec::new(), changed));
            }
            false => found.push((path.clone(), std::fs::read(&path).unwrap(), changed)),
        }
    }
    found.sort();
    found
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
fn a_folder_that_cannot_be_written_is_searched_and_nothing_in_it_changes() {
    let (dir, written) = collection(&["One lighthouse."]);
    drop(written);
    let old = first_version(&[("/d/zh.txt", "One 图书馆, one lighthouse.\n")]);
    for folder in [dir.path(), old.path()] {
        set_rights(folder, 0o555, 0o444);
        // Nothing keeps the administrator from writing: then this is a search like any other.
        let read_only = std::fs::write(folder.join("probe"), "").is_err();
        let before = listing(folder);
        let collection = open(folder).unwrap();
        assert_eq!(search(&collection, "lighthouse", 5).len(), 1);
        if read_only {
            assert!(matches!(collection.writer().err().unwrap(), DocumentsError::DataDir { .. }));
            assert_eq!(listing(folder), before);
        }
        drop(collection);
        set_rights(folder, 0o755, 0o644);
    }
}

#[test]
fn an_index_that_is_damaged_missing_or_of_another_analyzer_is_built_again() {
    let (dir, written) = collection(&["One lighthouse.", "A pilot."]);
    let index = index_dir(dir.path(), written.info().id);
    drop(written);
    let meta = index.join("meta.json");
    let spoil: [&dyn Fn(); 5] = [
        &|| std::fs::write(&meta, "torn").unwrap(),
        &|| std::fs::remove_dir_all(&index).unwrap(),
        &|| {
            let text = std::fs::read_to_string(&meta).unwrap();
            let version = |version: u32| format!("analyzer\\\":{version}");
            std::fs::write(&meta, text.replace(&version(VERSION), &version(VERSION - 1))).unwrap();
        },
        &|| {
            // Of a catalog that was written anew since.
            let text = std::fs::read_to_string(&meta).unwrap();
            std::fs::write(&meta, text.replace("generation\\\":0", "generation\\\":7")).unwrap();
        },
        // Killed in the middle of a swap.
        &|| std::fs::rename(&index, index.with_extension("whole")).unwrap(),
    ];
    for (number, spoil) in spoil.iter().enumerate() {
        let before = std::fs::read(&meta).unwrap();
        spoil();
        assert!(std::fs::read(&meta).ok() != Some(before), "nothing was spoilt in round {number}");
        let collection = open(dir.path()).unwrap();
        assert_eq!(passages(&collection, "lighthouses"), ["One lighthouse."], "round {number}");
        drop(collection);
    }
}

#[test]
fn a_language_that_is_set_decides_on_endings() {
    let dir = tempfile::tempdir().unwrap();
    let library = Library::new(dir.path());
    let text = "The libraries keep their spare keys in the blue cupboards beside the door.";
    let collection = library.collection_or_new(NAME).unwrap();
    put(&collection, "/d/a.txt", text);
    assert_eq!(passages(&collection, "library"), [text]);
    drop(collection);
    let german = LanguageSetting::Fixed("de".into());
    let collection = library.collection_or_new_in(NAME, Some(german)).unwrap();
    assert_eq!(passages(&collection, "library"), [""; 0]);
    assert_eq!(passages(&collection, "libraries"), [text]);
    drop((collection, library));
    assert_eq!(passages(&open(dir.path()).unwrap(), "library"), [""; 0], "it is kept");
    assert!(super::parse_language("xx").is_err());
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

/// The files of the catalog and of the indexes, and how many bits they have.
fn files(dir: &Path) -> Vec<(PathBuf, u64)> {
    let found = [catalog_dir(dir), dir.join("index")].into_iter().flat_map(|dir| listing(&dir));
    let bits = found.map(|(path, content, _)| (path, content.len() as u64 * 8));
    bits.filter(|(path, bits)| *bits > 0 && !path.ends_with("LOG")).collect()
}

/// What is found is what was written, or nothing is found with an error. Says whether something was missing.
fn check_citations(collection: Result<&Collection, &DocumentsError>, texts: &[(String, String)]) -> bool {
    let Ok(collection) = collection else { return true };
    let mut failed = false;
    for query in ["lighthouse keeper", "图书馆 钥匙", "locker 4417", "drawer"] {
        match collection.search(query, 50, &|| true) {
            Ok(found) => {
                failed |= found.len() < 6 && query != "locker 4417";
                for found in found {
                    let (_, text) = texts.iter().find(|(name, _)| Path::new(name) == found.path).unwrap();
                    let there: String = text.chars().skip(found.span.start).take(found.span.len()).collect();
                    assert_eq!(found.passage, there, "{query}");
                }
            }
            Err(error) => {
                let known = matches!(
                    error,
                    DocumentsError::Index { .. }
                        | DocumentsError::DamagedDocument { .. }
                        | DocumentsError::Catalog { .. }
                        | DocumentsError::DamagedCatalog { .. }
                );
                assert!(known, "{error}");
                failed = true;
            }
        }
    }
    for (name, text) in texts {
        match collection.document(Path::new(name)) {
            Ok(Some(stored)) => assert_eq!(stored.text, *text),
            Ok(None) => failed = true,
            Err(_) => failed = true,
        }
    }
    failed
}

/// Copies a folder.
fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().flatten() {
        match entry.path().is_dir() {
            true => copy(&entry.path(), &to.join(entry.file_name())),
            false => drop(std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap()),
        }
    }
}

#[test]
fn a_flipped_bit_never_cites_another_text_and_a_damaged_index_mends_itself() {
    let texts: Vec<(String, String)> = (0..6)
        .map(|i| (format!("/d/{i}.txt"), format!("The lighthouse keeper of tower {i} keeps the key in locker 441{i}.\n图书馆的备用钥匙在第{i}号储物柜里。\nThe drawer {i} is empty.\n")))
        .collect();
    let borrowed: Vec<&str> = texts.iter().map(|(_, text)| text.as_str()).collect();
    let (dir, collection) = collection(&borrowed);
    // Half of the texts in tables, half of them in the log.
    collection.catalog().erase().unwrap();
    put(&collection, "/d/0.txt", "Something else.");
    put(&collection, "/d/0.txt", &texts[0].1);
    drop(collection);
    let files = files(dir.path());
    assert!(files.len() > 10);
    // A generator of Marsaglia's (xorshift), so that a failure comes again.
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    let scratch = tempfile::tempdir().unwrap();
    let mut noticed = 0;
    for round in 0..120 {
        let image = scratch.path().join(round.to_string());
        copy(dir.path(), &image);
        let (path, bits) = &files[random(files.len() as u64) as usize];
        let place = image.join(path.strip_prefix(dir.path()).unwrap());
        flip(&place, random(*bits));
        let opened = open(&image);
        let failed = check_citations(opened.as_deref(), &texts);
        noticed += usize::from(failed);
        assert!(!failed || path.starts_with(catalog_dir(dir.path())), "{} was not built again", path.display());
        drop(opened);
        std::fs::remove_dir_all(image).unwrap();
    }
    assert!(noticed > 10, "{noticed} of 120 were noticed");
    assert!(!check_citations(open(dir.path()).as_deref(), &texts));
}

#[test]
fn an_index_that_lacks_any_of_its_files_is_built_again() {
    let (dir, collection) = collection(&["one river\n", "two rivers, one bridge\n"]);
    let info = collection.info().clone();
    drop(collection);
    let index = index_dir(dir.path(), info.id);
    let files: Vec<PathBuf> = std::fs::read_dir(&index).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(files.iter().any(|path| path.extension().is_some_and(|ending| ending == "pos")));
    for path in files {
        let image = tempfile::tempdir().unwrap();
        copy(dir.path(), image.path());
        std::fs::remove_file(image.path().join(path.strip_prefix(dir.path()).unwrap())).unwrap();
        let opened = open(image.path()).unwrap();
        assert_eq!(passages(&opened, "bridge"), ["two rivers, one bridge"], "without {}", path.display());
        assert_eq!(passages(&opened, "one bridge").len(), 2, "without {}", path.display());
    }
}

/// A process that dies in a commit leaves a file of removed passages, whose name the next process gives its own.
#[test]
fn what_a_commit_that_was_cut_off_left_is_in_nobodys_way() {
    for managed in [true, false] {
        let (dir, collection) = collection(&["one river\n", "two rivers, one bridge\n"]);
        let (info, catalog) = (collection.info().clone(), Arc::clone(collection.catalog()));
        drop(collection);
        let other = tempfile::tempdir().unwrap();
        copy(dir.path(), other.path());
        // Here the catalog has the change, and the index has not.
        catalog.change(|transaction| transaction.remove_name(&info, "/d/0.txt")).unwrap();
        drop(catalog);
        // There the commit is made; what it wrote first is brought here.
        let there = open_writable(other.path());
        there.writer().unwrap().change(|transaction, info| transaction.remove_name(info, "/d/0.txt")).unwrap();
        let (from, to) = (index_dir(other.path(), info.id), index_dir(dir.path(), info.id));
        let mut left = 0;
        for path in std::fs::read_dir(&from).unwrap().map(|entry| entry.unwrap().path()) {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if name.ends_with(".del") || (managed && name == ".managed.json") {
                std::fs::copy(&path, to.join(&name)).unwrap();
                left += usize::from(name.ends_with(".del"));
            }
        }
        assert_eq!(left, 1, "the commit wrote no file of removed passages");
        for _ in 0..2 {
            assert_eq!(passages(&open_writable(dir.path()), "river"), ["two rivers, one bridge"], "{managed}");
        }
    }
}

fn open_writable(dir: &Path) -> Arc<Collection> {
    Library::new(dir).collection_or_new(NAME).unwrap()
}

#[test]
fn passages_that_score_alike_come_in_the_order_of_names_and_places_however_they_came_in() {
    let names: Vec<String> = (0..90).map(|number| format!("/d/{number:02}.txt")).collect();
    // Two passages each that nothing but a number tells apart; more of them than are fetched at first.
    let document = |name: &String| document(name, &format!("A lamp {}a.\nA lamp {}b.\n", &name[3..5], &name[3..5]));
    let expected: Vec<(String, u32)> = names.iter().flat_map(|name| [(name.clone(), 0), (name.clone(), 1)]).collect();
    for (round, batch) in [(1, 90), (7, 9), (17, 31)] {
        let dir = tempfile::tempdir().unwrap();
        let collection = Library::new(dir.path()).collection_or_new(NAME).unwrap();
        let mut documents: Vec<NewDocument> = names.iter().map(document).collect();
        documents
            .sort_by_key(|document| blake3::hash(format!("{round}{}", document.name).as_bytes()).to_hex().to_string());
        documents.chunks(batch).for_each(|some| put_all(&collection, some));
        for limit in [1, 3, 40, 200] {
            let found = search(&collection, "lamp", limit);
            let places: Vec<_> =
                found.iter().map(|found| (found.path.to_str().unwrap().to_string(), found.number)).collect();
            assert_eq!(places, expected[..limit.min(180)], "{limit} of batches of {batch}");
        }
    }
}

//! From bytes to text: UTF-8, or an error that names the encoding and the command that converts it.

use std::path::Path;

use icu_properties::CodePointMapData;
use icu_properties::props::GeneralCategory;

use crate::error::{DocumentsError, Result};

/// Byte order marks of other encodings; those of UTF-32 first, as that of UTF-16 begins one of them.
const MARKS: [(&[u8], &str); 4] = [
    (&[0xff, 0xfe, 0, 0], "UTF-32"),
    (&[0, 0, 0xfe, 0xff], "UTF-32"),
    (&[0xff, 0xfe], "UTF-16"),
    (&[0xfe, 0xff], "UTF-16"),
];

/// Bytes that an encoding is guessed from.
const SAMPLE: usize = 4096;

/// The text, if it is UTF-8 and no other encoding whose bytes happen to be UTF-8 too, as those of Russian or English in
/// UTF-16 are.
pub(crate) fn decode(path: &Path, bytes: Vec<u8>) -> Result<String> {
    let other = |found, offset, encoding| DocumentsError::OtherEncoding { path: path.into(), found, offset, encoding };
    if let Some((_, encoding)) = MARKS.iter().find(|(mark, _)| bytes.starts_with(mark)) {
        return Err(other("the byte order mark of another encoding", 0, encoding));
    }
    let nul = bytes.iter().position(|&byte| byte == 0);
    if let Some(offset) = nul
        && let Some(encoding) = wide_latin(&bytes)
    {
        return Err(other("NUL bytes as of UTF-16 or UTF-32", offset, encoding));
    }
    let invalid = std::str::from_utf8(&bytes).err().map(|error| error.valid_up_to());
    // No text has that many; the upper bytes of Cyrillic, Greek and others are such.
    let is_control = |byte: &u8| byte.is_ascii_control() && !byte.is_ascii_whitespace();
    let controls = bytes.iter().take(SAMPLE).filter(|byte| is_control(byte)).count() * 4 > bytes.len().min(SAMPLE);
    if (nul.is_some() || invalid.is_some() || controls)
        && let Some(encoding) = utf16(&bytes)
    {
        let offset = [nul, invalid].into_iter().flatten().min().unwrap_or(0);
        return Err(other("bytes as of UTF-16", offset, encoding));
    }
    if let Some(offset) = nul {
        return Err(DocumentsError::NulInDocument { path: path.into(), offset });
    }
    String::from_utf8(bytes)
        .map_err(|e| DocumentsError::NotUtf8 { path: path.into(), offset: e.utf8_error().valid_up_to() })
}

/// Guesses an encoding of two or four bytes a character from where NUL bytes lie in the first of them, as they do in Latin
/// letters.
fn wide_latin(bytes: &[u8]) -> Option<&'static str> {
    let sample = &bytes[..bytes.len().min(SAMPLE) / 4 * 4];
    let share = |at: usize| {
        let column = sample.iter().skip(at).step_by(4);
        column.clone().filter(|&&byte| byte == 0).count() as f64 / column.count().max(1) as f64
    };
    let zeros = [share(0), share(1), share(2), share(3)].map(|share| share > 0.4);
    match zeros {
        [false, true, true, true] => Some("UTF-32LE"),
        [true, true, true, false] => Some("UTF-32BE"),
        [false, true, false, true] => Some("UTF-16LE"),
        [true, false, true, false] => Some("UTF-16BE"),
        _ => None,
    }
}

/// The byte order in which the bytes are a text of some script in UTF-16; `None` where they are one in neither.
fn utf16(bytes: &[u8]) -> Option<&'static str> {
    // A few bytes of an odd number are no such text.
    if bytes.len() % 2 == 1 && bytes.len() < 64 {
        return None;
    }
    let sample = &bytes[..bytes.len().min(SAMPLE)];
    // Two Latin letters are a Chinese character; but Chinese has others, too.
    let latin = sample.iter().filter(|byte| byte.is_ascii_alphabetic() || **byte == b' ').count();
    if latin * 10 > sample.len() * 7 {
        return None;
    }
    let units = |order: fn([u8; 2]) -> u16| sample.chunks_exact(2).map(move |pair| order([pair[0], pair[1]]));
    let scores = [("UTF-16LE", score(units(u16::from_le_bytes))), ("UTF-16BE", score(units(u16::from_be_bytes)))];
    let best = scores.into_iter().filter_map(|(name, score)| Some((name, score?)));
    best.max_by(|(_, a), (_, b)| a.total_cmp(b)).map(|(name, _)| name)
}

/// Blocks of scripts and marks that texts are made of today. Swapped bytes seldom lie in them.
const COMMON_BLOCKS: [(u32, u32); 14] = [
    (0x20, 0x7e),
    (0xa0, 0x17f),
    // Greek, Cyrillic; Hebrew, Arabic
    (0x370, 0x52f),
    (0x590, 0x6ff),
    // Scripts of India; Thai, Lao; Burmese; Khmer
    (0x900, 0xdff),
    (0xe00, 0xeff),
    (0x1000, 0x109f),
    (0x1780, 0x17ff),
    // Dashes and quotation marks; kana with their marks; Han; Hangul
    (0x2010, 0x203a),
    (0x3000, 0x30ff),
    (0x4e00, 0x9fff),
    (0xac00, 0xd7a3),
    // Full width; emoji
    (0xff01, 0xff65),
    (0x1f000, 0x1faff),
];

/// How much code units look like a text; `None` where they do not.
///
/// In a text, neighbouring characters lie in few blocks of Unicode, so that few upper bytes occur; characters that are not
/// assigned do not occur, and white space or punctuation does.
fn score(units: impl Iterator<Item = u16>) -> Option<f64> {
    use GeneralCategory as G;
    let category = const { CodePointMapData::<GeneralCategory>::new() };
    let (mut total, mut odd, mut known, mut spaced) = (0usize, 0usize, 0usize, 0usize);
    let mut uppers = [0usize; 256];
    for decoded in char::decode_utf16(units) {
        total += 1;
        let Ok(c) = decoded else {
            odd += 1;
            continue;
        };
        let code = u32::from(c);
        uppers[(code >> 8 & 0xff) as usize] += 1;
        let is_line_end = matches!(c, '\t' | '\n' | '\r');
        match category.get(c) {
            G::Unassigned | G::PrivateUse | G::Surrogate => odd += 1,
            G::Control if !is_line_end => odd += 1,
            _ => {}
        }
        let is_known = COMMON_BLOCKS.iter().any(|(first, last)| (*first..=*last).contains(&code));
        known += usize::from(is_known || is_line_end);
        let is_space = matches!(c, ' '..='@' | '\u{3000}'..='\u{30ff}' | '\u{ff01}'..='\u{ff1f}');
        spaced += usize::from(is_space || is_line_end);
    }
    if total == 0 || odd * 50 > total || known * 10 < total * 9 {
        return None;
    }
    // A text without white space and punctuation looks like bytes of other encodings, unless its upper bytes are control characters,
    // which these have not.
    let low: usize = uppers[..0x20].iter().sum();
    if spaced == 0 && low < total {
        return None;
    }
    let share = |count: usize| count as f64 / total as f64;
    // The chance that two characters have the same upper byte.
    let coherent: f64 = uppers.iter().map(|count| share(*count).powi(2)).sum();
    Some(coherent + share(spaced) + share(known) - 4.0 * share(odd))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// A text in UTF-16 without a byte order mark.
    fn wide(text: &str, big: bool) -> Vec<u8> {
        text.encode_utf16().flat_map(|unit| if big { unit.to_be_bytes() } else { unit.to_le_bytes() }).collect()
    }

    const TEXTS: [&str; 16] = [
        "阿明把备用钥匙放在第四四一七号储物柜里。图书馆每天早上九点开门，星期一休息。\n",
        "灯塔的看守人每天晚上都要点灯。\n\n他的名字叫王立，今年六十三岁，住在海边的一个小镇上。这里的冬天很冷，风也很大。\n",
        "圖書館每天早上九點開門，星期一休息。備用鑰匙在抽屜裡。",
        "図書館\n",
        "图书\n",
        "予備の鍵は図書館の受付にあります。\nスペアキーです。月曜日はお休みです。\n",
        "예비 열쇠는 도서관 안내 데스크에 있습니다. 도서관은 월요일에 쉽니다.\n",
        "Библиотеки хранят свои запасные ключи в синих шкафах рядом с дверью, и никто об этом не знает.\n",
        "Маяк",
        "приветмир",
        "The libraries keep their spare keys in the blue cupboards.\n",
        "lamp",
        "Το κλειδί είναι στη βιβλιοθήκη. Η βιβλιοθήκη ανοίγει στις εννέα.\n",
        "الخزانة رقم ٤٤١٧ في المكتبة. المكتبة مغلقة يوم الاثنين.\n",
        "กุญแจสำรองอยู่ที่โต๊ะประชาสัมพันธ์ของห้องสมุด\n",
        "Zug 🚂 nach Łódź, 12:45 Uhr – Gleis 3\n",
    ];

    #[test]
    fn utf16_of_any_script_is_named_with_its_byte_order() {
        for text in TEXTS {
            for big in [false, true] {
                let error = decode(Path::new("x.txt"), wide(text, big)).unwrap_err().to_string();
                let cure = if big { "iconv -f UTF-16BE -t UTF-8" } else { "iconv -f UTF-16LE -t UTF-8" };
                assert!(error.contains(cure), "{text}: {error}");
                // Cut off in the middle of a character, and long.
                let long = wide(&format!("{text}\n").repeat(400), big);
                let error = decode(Path::new("x.txt"), long[..long.len() - 1].to_vec()).unwrap_err().to_string();
                assert!(error.contains(cure), "{text} again and again: {error}");
            }
        }
    }

    #[test]
    fn utf8_of_any_script_is_taken_and_bytes_of_other_encodings_are_not_called_utf16() {
        for text in TEXTS {
            assert_eq!(decode(Path::new("x.txt"), text.into()).unwrap(), text);
        }
        let others: [&[u8]; 9] = [
            b"caf\xe9",
            b"Stra\xdfe 2004, Caf\xe9 30\n",
            b"caf\xe9 noir, un croissant et une br\xfbl\xe9e pour la dame du phare.\n",
            // Russian in KOI8-R and Windows-1251, Chinese in GBK, Japanese in Shift-JIS and EUC-JP, Korean in EUC-KR.
            b"\xed\xc1\xd1\xcb \xd3\xd4\xcf\xc9\xd4 \xce\xc1 \xc2\xc5\xd2\xc5\xc7\xd5.\n",
            b"\xcc\xe0\xff\xea \xf1\xf2\xee\xe8\xf2 \xed\xe0 \xe1\xe5\xf0\xe5\xe3\xf3.\n",
            b"\xcd\xbc\xca\xe9\xb9\xdd\xc3\xbf\xcc\xec\xd4\xe7\xc9\xcf\xbe\xc5\xb5\xe3\xbf\xaa\xc3\xc5\xa1\xa3\n",
            b"\x90}\x8f\x91\x8a\xd9\x82\xcc\x8e\xf3\x95t\x82\xc9\x82\xa0\x82\xe8\x82\xdc\x82\xb7\x81B\n",
            b"\xbf\xde\xbd\xf1\xb4\xdb\xa4\xce\xbc\xf5\xc9\xd5\xa4\xcb\xa4\xa2\xa4\xea\xa4\xde\xa4\xb9\xa1\xa3\n",
            b"\xb5\xb5\xbc\xad\xb0\xfc\xc0\xba \xbf\xf9\xbf\xe4\xc0\xcf\xbf\xa1 \xbd\xb1\xb4\xcf\xb4\xd9.\n",
        ];
        for bytes in others {
            let error = decode(Path::new("x.txt"), bytes.to_vec()).unwrap_err();
            assert!(matches!(error, DocumentsError::NotUtf8 { .. }), "{error}");
        }
    }

    #[test]
    fn text_in_other_encodings_is_refused_with_the_command_that_converts_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.txt");
        let text = "The lamp of Varn Point was lit in 1851. Żółć.\n";
        let wide = |mark: bool, big: bool| -> Vec<u8> {
            let units = mark.then_some(0xfeff).into_iter().chain(text.encode_utf16());
            units.flat_map(|unit: u16| if big { unit.to_be_bytes() } else { unit.to_le_bytes() }).collect()
        };
        let wider = |big: bool| -> Vec<u8> {
            let units = text.chars().map(|c| c as u32);
            units.flat_map(|unit| if big { unit.to_be_bytes() } else { unit.to_le_bytes() }).collect()
        };
        for (bytes, encoding) in [
            (wide(true, false), "UTF-16"),
            (wide(true, true), "UTF-16"),
            (wide(false, false), "UTF-16LE"),
            (wide(false, true), "UTF-16BE"),
            (wider(false), "UTF-32LE"),
            (wider(true), "UTF-32BE"),
            (b"\xff\xfe\x00\x00a\x00\x00\x00".to_vec(), "UTF-32"),
        ] {
            let error = decode(&path, bytes.clone()).unwrap_err().to_string();
            assert!(error.contains("x.txt") && error.contains(&format!("iconv -f {encoding} -t UTF-8")), "{error}");
            // The command does what the message says.
            std::fs::write(&path, bytes).unwrap();
            let converted =
                std::process::Command::new("iconv").args(["-f", encoding, "-t", "UTF-8"]).arg(&path).output();
            if let Ok(converted) = converted {
                let converted = decode(&path, converted.stdout).unwrap();
                assert!(converted == text || converted == "a", "{converted:?}");
            }
        }
        let error = decode(&path, b"a log\0torn here, and much more text than that".to_vec()).unwrap_err().to_string();
        assert!(error.contains("NUL byte at offset 5") && error.contains("UTF-16LE"), "{error}");
        let marked = decode(&path, b"\xef\xbb\xbfwith a mark".to_vec()).unwrap();
        assert_eq!(marked, "\u{feff}with a mark");
    }
}

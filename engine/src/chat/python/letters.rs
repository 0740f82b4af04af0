//! Kinds of characters and their cases as Python's texts know them.

use icu_casemap::CaseMapper;
use icu_properties::CodePointMapData;
use icu_properties::props::{GeneralCategory, GeneralCategoryGroup};

/// What stands for a digit and is none of a decimal system (Unicode's `Numeric_Type=Digit`).
const DIGITS: [(char, char); 20] = [
    ('\u{b2}', '\u{b3}'),
    ('\u{b9}', '\u{b9}'),
    ('\u{1369}', '\u{1371}'),
    ('\u{19da}', '\u{19da}'),
    ('\u{2070}', '\u{2070}'),
    ('\u{2074}', '\u{2079}'),
    ('\u{2080}', '\u{2089}'),
    ('\u{2460}', '\u{2468}'),
    ('\u{2474}', '\u{247c}'),
    ('\u{2488}', '\u{2490}'),
    ('\u{24ea}', '\u{24ea}'),
    ('\u{24f5}', '\u{24fd}'),
    ('\u{24ff}', '\u{24ff}'),
    ('\u{2776}', '\u{277e}'),
    ('\u{2780}', '\u{2788}'),
    ('\u{278a}', '\u{2792}'),
    ('\u{10a40}', '\u{10a43}'),
    ('\u{10e60}', '\u{10e68}'),
    ('\u{11052}', '\u{1105a}'),
    ('\u{1f100}', '\u{1f10a}'),
];

/// Letters that are numbers (`Numeric_Type=Numeric` of category Lo), without the compatibility ideographs.
const NUMBERS: &str = "㐅㒃㠪㭍一七万三九二五亖亿什仟仨伍佰億兆兩八六十千卄卅卌叁参參叄四壱壹幺廾廿弌弍弎弐拾捌柒漆玖百肆萬貮貳贰阡陆陌陸零\
                       𠀁𠁤𠃢𠄡𠤪𠦃𠦌𠦜𠫪𠫽𠬙𢎐𢦘𣬛𦉭\u{f96b}\u{f973}\u{f978}\u{f9b2}\u{f9d1}\u{f9d3}\u{f9fd}\u{2f890}";

fn category(c: char) -> GeneralCategory {
    CodePointMapData::<GeneralCategory>::new().get(c)
}

/// What Python calls white space: Unicode's and the four separators of ASCII.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

fn is_letter(c: char) -> bool {
    GeneralCategoryGroup::Letter.contains(category(c))
}

fn is_decimal(c: char) -> bool {
    category(c) == GeneralCategory::DecimalNumber
}

fn is_digit(c: char) -> bool {
    is_decimal(c) || DIGITS.iter().any(|(first, last)| (*first..=*last).contains(&c))
}

fn is_numeric(c: char) -> bool {
    GeneralCategoryGroup::Number.contains(category(c)) || NUMBERS.contains(c)
}

/// What belongs to a word in Python's regular expressions.
pub(super) fn is_word(c: char) -> bool {
    is_letter(c) || is_numeric(c) || c == '_'
}

fn is_title(c: char) -> bool {
    category(c) == GeneralCategory::TitlecaseLetter
}

fn is_cased(c: char) -> bool {
    c.is_lowercase() || c.is_uppercase() || is_title(c)
}

/// Python prints all but controls, format characters, separators other than the space, and what is not assigned.
pub(super) fn is_printable(c: char) -> bool {
    let hidden = GeneralCategoryGroup::Other.union(GeneralCategoryGroup::Separator);
    c == ' ' || !hidden.contains(category(c))
}

/// The methods of texts that ask what they are made of; `None` for all others.
pub(super) fn ask(text: &str, method: &str) -> Option<bool> {
    let all = |is: fn(char) -> bool| !text.is_empty() && text.chars().all(is);
    Some(match method {
        "isalpha" => all(is_letter),
        "isalnum" => all(|c| is_letter(c) || is_numeric(c)),
        "isascii" => text.is_ascii(),
        "isdecimal" => all(is_decimal),
        "isdigit" => all(is_digit),
        "isidentifier" => all(is_word) && text.chars().next().is_some_and(|c| is_letter(c) || c == '_'),
        "islower" => text.chars().any(char::is_lowercase) && !text.chars().any(|c| c.is_uppercase() || is_title(c)),
        "isnumeric" => all(is_numeric),
        "isprintable" => text.chars().all(is_printable),
        "isspace" => all(is_space),
        "istitle" => has_titles(text),
        "isupper" => text.chars().any(char::is_uppercase) && !text.chars().any(|c| c.is_lowercase() || is_title(c)),
        _ => return None,
    })
}

/// Whether capitals stand at the beginnings of runs of letters with cases, and nowhere else.
fn has_titles(text: &str) -> bool {
    let (mut inside, mut any) = (false, false);
    for c in text.chars() {
        let begins = c.is_uppercase() || is_title(c);
        if (begins && inside) || (c.is_lowercase() && !inside) {
            return false;
        }
        inside = is_cased(c);
        any |= inside;
    }
    any
}

/// The form of a character at the beginning of a title: `ǅ` for `ǆ`, `Ss` for `ß`.
fn titlecase(c: char) -> String {
    let single = CaseMapper::new().simple_titlecase(c);
    let mut capitals = c.to_uppercase();
    if single != c || capitals.len() == 1 {
        return single.into();
    }
    capitals.next().into_iter().chain(capitals.flat_map(char::to_lowercase)).collect()
}

/// Every run of letters with a capital at its beginning, wherever it begins: `It'S`.
pub(super) fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut inside = false;
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let ends_word = !chars.peek().is_some_and(|next| is_cased(*next));
        match (inside, c) {
            (false, c) => out.push_str(&titlecase(c)),
            (true, 'Σ') if ends_word => out.push('ς'),
            (true, c) => out.extend(c.to_lowercase()),
        }
        inside = is_cased(c);
    }
    out
}

/// One capital, and the rest small.
pub(super) fn capitalize(text: &str) -> String {
    let mut rest = text.chars();
    rest.next().map_or_else(String::new, |first| titlecase(first) + &rest.as_str().to_lowercase())
}

/// Without differences of case.
pub(super) fn casefold(text: &str) -> String {
    CaseMapper::new().fold_string(text).into_owned()
}

/// Capitals small and the other way round.
pub(super) fn swapcase(text: &str) -> String {
    let swap =
        |c: char| -> String { if c.is_uppercase() { c.to_lowercase().collect() } else { c.to_uppercase().collect() } };
    text.chars().map(swap).collect()
}

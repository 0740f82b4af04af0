//! Citations as clients see them: the server's folders are its own.
//!
//! Every citation is shown twice: whole in the answer's `quire.citations`, and in the same order as an annotation of the
//! message, in the shapes of OpenAI's API.

use std::path::Path;

use serde_json::{Value, json};

use service::{Answer, Citation, GivenPassage, attached_name};

/// A citation with the document's name in place of its path, and an id that tells documents of one name apart. What came
/// with the question has its own names.
pub(super) fn public(citation: &Citation) -> Value {
    let mut shown = serde_json::to_value(citation).unwrap_or_else(|_| json!({}));
    match &citation.given {
        Some(given) => add_given(&mut shown, given),
        None => {
            shown["document"] = json!(file_name(&citation.document));
            shown["document_id"] = json!(document_id(citation));
            if let Some((file, _)) = citation.document.to_str().and_then(attached_name) {
                shown["file_id"] = json!(file);
            }
        }
    }
    shown
}

fn add_given(shown: &mut Value, given: &GivenPassage) {
    let texts = [("id", &given.id), ("filename", &given.filename), ("title", &given.title), ("url", &given.url)];
    for (key, text) in texts.into_iter().filter(|(_, text)| text.is_some()) {
        shown[key] = json!(text);
    }
    if let Some(attributes) = &given.attributes {
        shown["attributes"] = json!(attributes);
    }
}

/// The citations of an answer as annotations of its message: a `url_citation` for passages that came with a `url`, a
/// `file_citation` for all others.
///
/// `index` is the place in the list, for clients that put the pieces of a stream together by it. The characters of the
/// answer that stand in the passage (all of the answer where none do), the passage's place in its document and whether
/// it contains the answer are fields beside the usual ones.
pub(super) fn annotations(answer: &Answer) -> Vec<Value> {
    let characters = answer.text.chars().count();
    answer.citations.iter().enumerate().map(|(index, citation)| annotation(index, citation, characters)).collect()
}

fn annotation(index: usize, citation: &Citation, characters: usize) -> Value {
    let (start, end) = citation.answer_span.map_or((0, characters), |span| (span.start, span.end));
    let given = citation.given.as_deref();
    let mut shown = match given.and_then(|given| given.url.as_deref()) {
        Some(url) => {
            let title = given.and_then(|given| given.title.as_deref().or(given.filename.as_deref())).unwrap_or(url);
            json!({"type": "url_citation", "url_citation":
                   {"start_index": start, "end_index": end, "title": title, "url": url}})
        }
        None => json!({"type": "file_citation", "file_id": file_id(citation), "filename": name(citation),
                       "start_index": start, "end_index": end}),
    };
    shown["index"] = json!(index);
    shown["span"] = json!(citation.span);
    shown["contains_answer"] = json!(citation.contains_answer);
    shown
}

/// The id that a passage came with, else its name there; of a file that a client attached, the file's; else the document's.
fn file_id(citation: &Citation) -> String {
    match &citation.given {
        Some(given) => given.id.clone().unwrap_or_else(|| given.name().into()),
        None => {
            let attached = citation.document.to_str().and_then(attached_name);
            attached.map_or_else(|| document_id(citation), |(file, _)| file.into())
        }
    }
}

fn name(citation: &Citation) -> String {
    match &citation.given {
        Some(given) => given.name().into(),
        None => file_name(&citation.document),
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into()
}

/// The document's id, which stays whatever becomes of its file.
fn document_id(citation: &Citation) -> String {
    citation.document_id.map(|id| id.to_string()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use documents::{DocumentId, Span};
    use service::Stats;
    use std::sync::Arc;

    fn citation(given: Option<GivenPassage>, answer_span: Option<Span>) -> Citation {
        let document = given.as_ref().map_or("/srv/secret/notes.txt".into(), |given| (*given.name()).into());
        Citation {
            document,
            span: Span { start: 5, end: 9 },
            line: 1,
            passage: "text".into(),
            score: given.is_none().then_some(2.5),
            contains_answer: answer_span.is_some(),
            answer_span,
            document_id: given.is_none().then(DocumentId::random),
            given: given.map(Arc::new),
        }
    }

    #[test]
    fn documents_of_one_name_are_told_apart_without_their_folders() {
        let [one, other] = [citation(None, None), citation(None, None)].map(|citation| public(&citation));
        assert_ne!(one["document_id"], other["document_id"]);
        assert!(one["document"] == "notes.txt" && !one.to_string().contains("secret"), "{one}");
    }

    #[test]
    fn a_file_that_was_attached_goes_by_its_own_id() {
        let file = format!("file-{}", "0".repeat(24));
        let attached = Citation { document: format!("{file}/notes.md").into(), ..citation(None, None) };
        let shown = public(&attached);
        assert_eq!((&shown["document"], &shown["file_id"]), (&json!("notes.md"), &json!(file)));
        let annotation = annotation(0, &attached, 9);
        assert_eq!((&annotation["file_id"], &annotation["filename"]), (&json!(file), &json!("notes.md")));
        assert!(shown["document_id"].as_str().unwrap().starts_with("doc_"));
    }

    #[test]
    fn annotations_have_the_usual_shapes_and_an_index_each() {
        let given = |id: Option<&str>, url: Option<&str>| GivenPassage {
            id: id.map(str::to_string),
            url: url.map(str::to_string),
            title: Some("Tides".into()),
            ..GivenPassage::default()
        };
        let citations = vec![
            citation(None, Some(Span { start: 2, end: 4 })),
            citation(Some(given(Some("p-7"), None)), None),
            citation(Some(given(None, None)), None),
            citation(Some(given(Some("p-8"), Some("https://tides.example/"))), None),
        ];
        let answer = Answer {
            text: "Ée 42".into(),
            finish_reason: "stop".into(),
            citations,
            stats: Stats::default(),
            notes: Vec::new(),
        };
        let shown = annotations(&answer);
        let of = |key: &str| -> Vec<Value> { shown.iter().map(|annotation| annotation[key].clone()).collect() };
        assert_eq!(of("index"), [0, 1, 2, 3].map(Value::from));
        assert_eq!(of("file_id")[1..], [json!("p-7"), json!("Tides"), Value::Null]);
        let nameless = citation(Some(GivenPassage { number: 3, ..GivenPassage::default() }), None);
        assert_eq!((file_id(&nameless), &public(&nameless)["document"]), ("passage 3".into(), &json!("passage 3")));
        assert_eq!(of("filename")[..3], ["notes.txt", "Tides", "Tides"].map(Value::from));
        assert_eq!(of("start_index")[..2], [json!(2), json!(0)]);
        assert_eq!(of("end_index")[..2], [json!(4), json!(5)]);
        let url = json!({"start_index": 0, "end_index": 5, "title": "Tides", "url": "https://tides.example/"});
        assert_eq!((&shown[3]["type"], &shown[3]["url_citation"]), (&json!("url_citation"), &url));
        assert_eq!(shown[0]["span"], json!({"start": 5, "end": 9}));
    }
}

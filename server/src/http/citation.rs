//! Citations as clients see them: the server's folders are its own.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use serde_json::{Value, json};

use crate::service::Citation;

/// A citation with the document's name in place of its path, and an id that tells documents of one name apart.
pub(super) fn public(citation: &Citation) -> Value {
    let mut shown = serde_json::to_value(citation).unwrap_or_else(|_| json!({}));
    shown["document"] = json!(citation.document.file_name().unwrap_or_default().to_string_lossy());
    shown["document_id"] = json!(document_id(&citation.document));
    shown
}

/// The same for the same path, today and tomorrow.
fn document_id(path: &Path) -> String {
    let hash = blake3::Hasher::new_derive_key("quire document id 1").update(path.as_os_str().as_bytes()).finalize();
    format!("doc-{}", &hash.to_hex()[..16])
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn documents_of_one_name_are_told_apart_without_their_folders() {
        let [one, other] = ["/home/ann/secret/notes.txt", "/srv/notes.txt"].map(|path| document_id(Path::new(path)));
        assert_ne!(one, other);
        assert_eq!(one, document_id(Path::new("/home/ann/secret/notes.txt")));
    }
}

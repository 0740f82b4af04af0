//! Lists in pages.

/// Which part of a list is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageRequest {
    /// The page begins behind this id.
    pub after: Option<String>,
    /// The page ends before this id.
    pub before: Option<String>,
    /// Items at most.
    pub limit: usize,
    /// What was made last comes first.
    pub newest_first: bool,
}

/// A part of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page<T> {
    /// The items.
    pub data: Vec<T>,
    /// Whether there are more, in the direction in which was asked.
    pub has_more: bool,
}

impl<T> Page<T> {
    /// The items with other contents.
    pub fn map<U>(self, change: impl FnMut(T) -> U) -> Page<U> {
        Page { data: self.data.into_iter().map(change).collect(), has_more: self.has_more }
    }
}

impl PageRequest {
    /// The page of a list whose ids `id` tells. Ids are sorted, not looked up: a cursor keeps its place when what it
    /// names is removed, as by whoever removes all things of a list page by page.
    pub(crate) fn of<T>(&self, mut items: Vec<T>, id: impl Fn(&T) -> &str) -> Page<T> {
        items.sort_by(|a, b| match self.newest_first {
            true => id(b).cmp(id(a)),
            false => id(a).cmp(id(b)),
        });
        // Whether the first id comes before the second in this list.
        let precedes = |a: &str, b: &str| if self.newest_first { a > b } else { a < b };
        items.retain(|item| {
            self.after.as_deref().is_none_or(|after| precedes(after, id(item)))
                && self.before.as_deref().is_none_or(|before| precedes(id(item), before))
        });
        let has_more = items.len() > self.limit;
        if has_more && self.before.is_some() && self.after.is_none() {
            // Those right before the cursor.
            items.drain(..items.len() - self.limit);
        }
        items.truncate(self.limit);
        Page { data: items, has_more }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn request(after: Option<&str>, before: Option<&str>, limit: usize, newest_first: bool) -> PageRequest {
        PageRequest { after: after.map(str::to_string), before: before.map(str::to_string), limit, newest_first }
    }

    fn page(letters: &str, request: &PageRequest) -> (String, bool) {
        let page = request.of(letters.chars().map(String::from).collect(), |item: &String| item);
        (page.data.concat(), page.has_more)
    }

    #[test]
    fn cursors_bound_a_page_also_when_what_they_name_is_gone() {
        assert_eq!(page("dbac", &request(None, None, 3, true)), ("dcb".into(), true));
        assert_eq!(page("dbac", &request(Some("b"), None, 3, true)), ("a".into(), false));
        assert_eq!(page("dac", &request(Some("b"), None, 3, false)), ("cd".into(), false));
        assert_eq!(page("dbac", &request(None, Some("d"), 2, false)), ("bc".into(), true));
        assert_eq!(page("dbac", &request(Some("a"), Some("d"), 1, false)), ("b".into(), true));
        assert_eq!(page("", &request(None, None, 3, true)), (String::new(), false));
    }

    proptest! {
        #[test]
        fn pages_make_up_the_list_while_what_was_seen_is_removed(count in 0u32..40, limit in 1usize..9, newest in any::<bool>()) {
            let mut left: Vec<String> = (0..count).map(|i| format!("{i:03}")).collect();
            let (mut seen, mut after) = (Vec::new(), None);
            loop {
                let page = request(after.as_deref(), None, limit, newest).of(left.clone(), |item: &String| item);
                after = page.data.last().cloned();
                left.retain(|item| !page.data.contains(item));
                seen.extend(page.data);
                if !page.has_more {
                    break;
                }
            }
            if newest {
                seen.reverse();
            }
            prop_assert_eq!(seen, (0..count).map(|i| format!("{i:03}")).collect::<Vec<_>>());
        }
    }
}

//! Room for what a step takes: pages that nobody uses give way, and where that is not enough, the youngest.

use super::{Queue, Runner};
use crate::kv::prefix::SharedPage;
use crate::scheduler::{Bytes, Step};

impl Runner {
    /// Gives those of the jobs that begin in this step their pages: pages that nobody uses give way. A GPU may have fewer than the
    /// scheduler knows of, held by prepared contexts: then a job waits, unless nothing runs that would make room.
    pub(super) fn begin_jobs(&self, queue: &mut Queue, step: &mut Step) {
        while queue.begun < step.jobs.len() {
            let pages = self.pages(queue.jobs[queue.begun].tokens());
            let alone = queue.running == 0 && queue.begun == 0;
            if !alone && pages > self.pages_to_be_had(queue, pages) {
                break;
            }
            self.evict_for(queue, self.limits.page_bytes.times(pages));
            self.make_free(queue, pages);
            if let Err(error) = queue.jobs[queue.begun].begin(&self.model) {
                queue.jobs.remove(queue.begun).fail(error);
                step.jobs.remove(queue.begun);
                continue;
            }
            queue.begun += 1;
        }
        step.jobs.truncate(queue.begun);
    }

    /// Pages of a GPU that are free, or would be without those that nobody uses; `most` if there are more.
    pub(super) fn pages_to_be_had(&self, queue: &Queue, most: usize) -> usize {
        let Some(device) = self.model.device() else { return most };
        let free = device.pool.pages().1.min(most);
        free + queue.cache.unused(most - free, &SharedPage::is_last)
    }

    /// Pages of KV that no request accounts for; one more for where a page is copied.
    fn pages(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.limits.page_tokens) + 1
    }

    /// Pages that nobody uses give way to those that a step takes. Where a GPU has too few even so, as some are taken that no
    /// request accounts for (by prepared contexts), the youngest that hold some give way too, or wait.
    pub(super) fn make_room(&self, queue: &mut Queue, step: &mut Step) {
        let tokens = &mut step.tokens;
        let growth =
            queue.sequences.iter().zip(&*tokens).map(|(s, n)| self.limits.bytes(s.takes(*n).saturating_sub(s.room())));
        let growth = growth.sum();
        self.evict_for(queue, growth);
        let missing = |queue: &Queue, tokens: &[usize]| -> usize {
            queue.sequences.iter().zip(tokens).map(|(s, n)| s.missing_on_device(*n)).sum()
        };
        while !self.make_free(queue, missing(queue, tokens)) {
            let frees = |place: &usize| {
                let (sequence, page) = (&queue.sequences[*place], self.limits.page_bytes);
                sequence.own_bytes(&queue.cache, page).0.device > 0
            };
            if let Some(place) = (1..tokens.len()).rev().find(frees) {
                tokens.remove(place);
                self.arrange(queue, &[place], tokens.len());
            } else if let Some(tokens) = tokens.iter_mut().skip(1).rev().find(|tokens| **tokens > 0) {
                *tokens = 0;
            } else if queue.begun > 0 {
                // A job gives its pages back when it is done.
                tokens[..1].fill(0);
                break;
            } else {
                // Nobody is left to give way. Where no answer has begun, reading says what is missing.
                if tokens.first().is_some_and(|tokens| *tokens > 0) && queue.sequences[0].cut() {
                    tokens[0] = 0;
                }
                break;
            }
            queue.full_at = Some(self.pages_to_be_had(queue, usize::MAX - 1));
        }
    }

    /// Pages that nobody uses give way until so many bytes fit into the budget.
    fn evict_for(&self, queue: &mut Queue, bytes: Bytes) {
        let page = self.limits.page_bytes;
        let unused = page.times(queue.cache.len() - queue.cache.in_use());
        let held = queue.used(page) + unused + bytes;
        queue.cache.evict(self.limits.pages_over(held), &|_| true);
    }

    /// On a GPU: cached pages give way until so many are free, or none is left that nobody uses. Whether so many are free.
    fn make_free(&self, queue: &mut Queue, pages: usize) -> bool {
        let Some(device) = self.model.device() else { return true };
        queue.cache.evict(pages.saturating_sub(device.pool.pages().1), &SharedPage::is_last);
        pages <= device.pool.pages().1
    }
}

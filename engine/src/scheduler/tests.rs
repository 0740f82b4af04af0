#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

const PAGE: usize = 16;
const PAGE_BYTES: Bytes = Bytes { device: 3, host: 2 };

fn limits(step_tokens: usize, max_sequences: usize, pages: usize) -> Limits {
    let budget = PAGE_BYTES.times(pages);
    Limits {
        step_tokens,
        mixed_prefill_tokens: step_tokens,
        max_sequences,
        page_tokens: PAGE,
        page_bytes: PAGE_BYTES,
        budget,
    }
}

fn waiting(tokens: usize) -> Entry {
    let work = Work::Read { tokens, whole: false };
    Entry { work, ahead: tokens, room: 0, own: Bytes::default(), shared: Bytes::default(), age: 0 }
}

/// A plan where there are no jobs.
fn plan(limits: &Limits, used: Bytes, requests: &[Entry], running: usize) -> Step {
    super::plan(limits, &Queued { requests, running, used, ..Queued::default() })
}

/// One that holds `held` tokens.
fn decoding(held: usize) -> Entry {
    let pages = held.div_ceil(PAGE);
    Entry { work: Work::Decode, ahead: 1, room: pages * PAGE - held, own: PAGE_BYTES.times(pages), ..waiting(1) }
}

fn used(running: &[Entry]) -> Bytes {
    running.iter().map(|e| e.own).sum()
}

fn tokens(limits: &Limits, queue: &[Entry], running: usize) -> Vec<usize> {
    let step = plan(limits, used(&queue[..running]), queue, running);
    assert_eq!(step.out_of_memory, None);
    step.tokens
}

#[test]
fn decodes_come_first_and_prompts_share_the_rest() {
    let queue = [decoding(20), waiting(50), decoding(30), waiting(70), waiting(5)];
    assert_eq!(tokens(&limits(64, 8, 100), &queue, 4), [1, 50, 1, 12]);
    assert_eq!(tokens(&limits(128, 8, 100), &queue, 4), [1, 50, 1, 70, 5]);
    assert_eq!(tokens(&limits(128, 4, 100), &queue, 4), [1, 50, 1, 70], "as many as may run");
    assert_eq!(tokens(&limits(1, 8, 100), &queue, 4), [1, 1, 1, 0], "a prompt reads one token at least");
}

#[test]
fn prompts_take_larger_steps_while_nobody_decodes() {
    let limits = Limits { mixed_prefill_tokens: 16, ..limits(64, 8, 100) };
    assert_eq!(tokens(&limits, &[waiting(50), waiting(70)], 0), [50, 14]);
    assert_eq!(tokens(&limits, &[waiting(50), decoding(20), waiting(70)], 2), [16, 1]);
    assert_eq!(tokens(&Limits { step_tokens: 8, ..limits }, &[waiting(50), decoding(20)], 2), [7, 1]);
}

#[test]
fn a_context_goes_on_by_what_is_left_of_a_step_and_several_do_in_turn() {
    let context = |left, n| Entry { work: Work::Blend { tokens: left, takes: n }, ahead: n + 4, ..waiting(0) };
    let queue = [decoding(20), context(100, 160), waiting(9)];
    assert_eq!(tokens(&limits(32, 8, 100), &queue, 3), [1, 31, 0]);
    assert_eq!(tokens(&limits(32, 8, 100), &[waiting(9), context(100, 0), decoding(20)], 3), [9, 22, 1]);
    // The first needs little more, so that the second goes on in the same step; one whose layer has not come waits alone.
    assert_eq!(tokens(&limits(32, 8, 100), &[context(10, 0), context(40, 0), decoding(9)], 3), [10, 21, 1]);
    let layerless = Entry { work: Work::Wait, ..context(1, 0) };
    assert_eq!(tokens(&limits(32, 8, 100), &[layerless, context(40, 0), decoding(9)], 3), [0, 31, 1]);
    // All its pages are taken with its first piece, however small that is, and none with the others.
    let grown = |entry: Entry| {
        let queue = [decoding(15), entry];
        let step = plan(&limits(32, 8, 11), used(&queue), &queue, 2);
        (step.preempted, step.tokens)
    };
    assert_eq!(grown(context(100, 160)), (vec![], vec![1, 31]));
    let holds = |n| Entry { own: PAGE_BYTES, ..context(100, n) };
    assert_eq!(grown(holds(161)), (vec![1], vec![1]), "eleven pages beside one: it gives way itself");
    assert_eq!(grown(holds(0)), (vec![], vec![1, 31]));
    let whole = Entry { work: Work::Read { tokens: 40, whole: true }, ..waiting(40) };
    assert_eq!(tokens(&limits(32, 8, 100), &[whole, whole], 2), [40, 0]);
    assert_eq!(tokens(&limits(80, 8, 100), &[whole, whole], 2), [40, 40]);
}

/// Of a step with jobs: tokens of requests and of jobs.
fn with_jobs(
    limits: &Limits,
    requests: &[Entry],
    running: usize,
    jobs: &[Entry],
    begun: usize,
) -> (Vec<usize>, Vec<usize>) {
    let used = used(&requests[..running]) + used(&jobs[..begun]);
    let step = super::plan(limits, &Queued { requests, running, jobs, begun, used });
    (step.tokens, step.jobs)
}

fn aged(age: u64, entry: Entry) -> Entry {
    Entry { age, ..entry }
}

/// One that holds its pages.
fn job(age: u64, left: usize, all: usize) -> Entry {
    let own = PAGE_BYTES.times(all.div_ceil(PAGE));
    Entry { own, room: all, ahead: all, age, ..waiting(left) }
}

#[test]
fn jobs_and_prompts_share_a_step_by_age_and_decoding_goes_first() {
    let limits = Limits { mixed_prefill_tokens: 20, ..limits(64, 2, 100) };
    let decodes = aged(1, decoding(20));
    assert_eq!(with_jobs(&limits, &[decodes], 1, &[job(2, 50, 60)], 1), (vec![1], vec![20]));
    let reads = |age| aged(age, waiting(15));
    assert_eq!(with_jobs(&limits, &[decodes, reads(2)], 2, &[job(3, 50, 60)], 1), (vec![1, 15], vec![5]));
    assert_eq!(with_jobs(&limits, &[decodes, reads(4)], 2, &[job(3, 12, 60)], 1), (vec![1, 8], vec![12]));
    // Small ones go together, and none needs a place among the requests.
    let small = [job(3, 6, 6), job(4, 6, 6), job(5, 6, 6), job(6, 6, 6), job(7, 6, 6)]
        .map(|j| Entry { own: Bytes::default(), ..j });
    assert_eq!(with_jobs(&limits, &[decodes, decodes, reads(2)], 2, &small, 0), (vec![1, 1], vec![6, 6, 6, 2]));
    assert_eq!(with_jobs(&limits, &[], 0, &small, 0), (vec![], vec![6, 6, 6, 6]), "four at a time");
}

#[test]
fn a_job_waits_for_room_for_all_of_it_and_who_is_younger_waits_behind_it() {
    let decodes = aged(1, decoding(20));
    let waits = |age, n| Entry { own: Bytes::default(), ..job(age, n, n) };
    // Two pages are held; the job takes three.
    let (older, younger) = (aged(2, waiting(9)), aged(4, waiting(9)));
    assert_eq!(with_jobs(&limits(64, 8, 5), &[decodes, younger], 1, &[waits(3, 40)], 0), (vec![1], vec![40]));
    assert_eq!(with_jobs(&limits(64, 8, 4), &[decodes, younger], 1, &[waits(3, 40)], 0), (vec![1], vec![]));
    assert_eq!(with_jobs(&limits(64, 8, 4), &[decodes, older], 1, &[waits(3, 40)], 0), (vec![1, 9], vec![]));
    assert_eq!(with_jobs(&limits(64, 8, 2), &[], 0, &[waits(3, 40)], 0), (vec![], vec![40]), "nothing else makes room");
    // The oldest needs a page that a job holds: it has it when the job is done.
    let grows = aged(1, decoding(32));
    assert_eq!(with_jobs(&limits(64, 8, 5), &[grows], 1, &[job(2, 9, 40)], 1), (vec![0], vec![9]));
    assert_eq!(with_jobs(&limits(64, 8, 6), &[grows], 1, &[job(2, 9, 40)], 1), (vec![1], vec![9]));
}

#[test]
fn a_prompt_waits_for_room_for_all_of_it_and_nothing_overtakes_it() {
    // Six pages: two are held, two more are promised to the prompt that is being read.
    let reading = Entry { own: PAGE_BYTES.times(1), ahead: 32, ..waiting(32) };
    let queue = [decoding(10), reading, waiting(17), waiting(1)];
    assert_eq!(tokens(&limits(8, 8, 6), &queue, 2), [1, 7]);
    assert_eq!(tokens(&limits(40, 8, 6), &queue, 2), [1, 32], "room for its two pages, but not for an answer");
    assert_eq!(tokens(&limits(40, 8, 7), &queue, 2), [1, 32, 7]);
    let sharing = Entry { ahead: 1, ..waiting(17) };
    assert_eq!(tokens(&limits(64, 8, 6), &[decoding(10), reading, sharing], 2), [1, 32, 17], "it brings pages along");
}

#[test]
fn what_a_prompt_that_is_being_read_still_needs_is_not_given_away() {
    // A step reads one page of it, although the budget of tokens would allow for more.
    let part = Work::Read { tokens: 16, whole: false };
    let reading = Entry { work: part, own: PAGE_BYTES.times(1), ahead: 48, ..waiting(0) };
    let queue = [decoding(10), reading, waiting(17)];
    // One page and two are held after this step, two are promised, two are wanted and one is for an answer.
    assert_eq!(tokens(&limits(64, 8, 7), &queue, 2), [1, 16]);
    assert_eq!(tokens(&limits(64, 8, 8), &queue, 2), [1, 16, 17]);
}

#[test]
fn the_youngest_gives_way_and_the_oldest_never_does() {
    // All three need a new page, one is free.
    let queue = [decoding(32), decoding(16), decoding(48), waiting(1)];
    assert_eq!(tokens(&limits(64, 8, 7), &queue, 3), [1, 1]);
    assert_eq!(tokens(&limits(64, 8, 6), &queue, 3), [1, 1], "what the youngest held serves the others");
    assert_eq!(tokens(&limits(64, 8, 3), &queue[..2], 2), [1]);
    let step = plan(&limits(64, 8, 2), used(&queue[..1]), &queue, 1);
    assert_eq!((step.tokens, step.out_of_memory), (vec![0], Some(PAGE_BYTES.times(3))));
}

#[test]
fn who_holds_nothing_of_what_is_short_does_not_give_way() {
    let on = |device, host| Bytes { device, host };
    let page = on(16, 0);
    let limits = Limits { page_bytes: page, budget: on(16 * 8, 100), ..limits(64, 8, 0) };
    let holding = |own: Bytes| Entry { own, room: 1, ..decoding(15) };
    // An index of the second one has grown beyond the host's memory: the youngest holds none of that.
    let queue = [holding(on(16, 30)), holding(on(16, 80)), holding(on(16, 0)), waiting(1)];
    let step = plan(&limits, used(&queue[..3]), &queue, 3);
    assert_eq!((step.preempted, step.tokens, step.out_of_memory), (vec![1], vec![1, 1], None));
    // The oldest's own index is too large: nobody else can help.
    let queue = [holding(on(16, 130)), holding(on(16, 0)), holding(on(16, 0))];
    let step = plan(&limits, used(&queue), &queue, 3);
    assert_eq!((step.preempted, step.tokens, step.out_of_memory), (vec![], vec![0], Some(on(16, 130))));
    // The second needs a page of the device's; what the youngest holds is all shared.
    let shares = Entry { shared: page, room: 1, ..waiting(1) };
    let shares = Entry { work: Work::Decode, ..shares };
    let full = Entry { room: 0, own: page.times(3), ..decoding(48) };
    let limits = Limits { budget: on(16 * 8, 100), ..limits };
    let queue =
        [Entry { room: 1, ..full }, Entry { own: page.times(4), ..full }, Entry { own: Bytes::default(), ..shares }];
    let step = plan(&limits, used(&queue) + page, &queue, 3);
    assert_eq!((step.preempted, step.tokens), (vec![1], vec![1, 1]), "it gives way itself");
    // One that holds nothing of its own waits with what it has, and whoever fits goes on.
    let grows = Entry { room: 0, ..shares };
    let queue = [Entry { own: page.times(7), room: 1, ..full }, grows, shares];
    let step = plan(&limits, page.times(8), &queue, 3);
    assert_eq!((step.preempted, step.tokens), (vec![], vec![1, 0, 1]));
    // The oldest goes on in any case: what others share with each other alone is free without them.
    let queue = [Entry { own: page.times(7), ..full }, shares, shares];
    let step = plan(&limits, page.times(8), &queue, 3);
    assert_eq!((step.preempted, step.tokens, step.out_of_memory), (vec![1, 2], vec![1], None));
}

#[test]
fn who_waits_for_an_index_reads_nothing_and_keeps_its_place() {
    let indexing = Entry { work: Work::Wait, ..decoding(40) };
    let queue = [indexing, decoding(20), indexing, waiting(9)];
    assert_eq!(tokens(&limits(64, 8, 100), &queue, 3), [0, 1, 0, 9]);
    assert_eq!(tokens(&limits(64, 8, 100), &queue[..1], 1), [0]);
}

#[test]
fn of_two_prompts_that_fit_only_alone_one_is_admitted() {
    // Two pages each; for whoever runs beside another, one more is kept for an answer.
    let queue = [waiting(20), waiting(20), waiting(20)];
    for (pages, admitted) in [(2, 1), (3, 1), (4, 1), (5, 2), (6, 2), (7, 3)] {
        assert_eq!(tokens(&limits(64, 8, pages), &queue, 0), vec![20; admitted], "{pages} pages");
    }
    // Also beside one that runs, and where a step reads only a part of each prompt.
    let queue = [decoding(10), waiting(20), waiting(20)];
    for (pages, admitted) in [(3, 1), (4, 2), (5, 2), (6, 3)] {
        assert_eq!(tokens(&limits(64, 8, pages), &queue, 1).len(), admitted, "{pages} pages");
        assert_eq!(tokens(&limits(9, 8, pages), &queue, 1).len(), admitted.min(2), "{pages} pages, few tokens");
    }
}

#[test]
fn preempting_frees_only_what_nobody_else_holds() {
    let shared = |own, shared| Entry { own: PAGE_BYTES.times(own), shared: PAGE_BYTES.times(shared), ..decoding(16) };
    // The three hold four pages together, and two, one and none alone; each needs one more.
    let queue = [shared(2, 4), shared(1, 4), shared(0, 4)];
    let step = |pages| {
        let step = plan(&limits(64, 8, pages), PAGE_BYTES.times(7), &queue, 3);
        (step.preempted, step.tokens, step.out_of_memory)
    };
    assert_eq!(step(10), (vec![], vec![1, 1, 1], None));
    assert_eq!(step(9), (vec![], vec![1, 1, 0], None), "the youngest would free nothing, and waits");
    assert_eq!(step(8), (vec![1], vec![1, 1], None));
    assert_eq!(step(7), (vec![1], vec![1, 0], None), "one page is free, not those that are shared");
    assert_eq!(step(6), (vec![1, 2], vec![0], Some(PAGE_BYTES.times(7))));
}

#[test]
fn either_memory_can_be_the_short_one() {
    let short = |device, host| Limits { budget: Bytes { device, host }, ..limits(64, 8, 0) };
    for budget in [short(2, 1000), short(1000, 1)] {
        let step = plan(&budget, Bytes::default(), &[waiting(5)], 0);
        assert_eq!((step.tokens, step.out_of_memory), (vec![0], Some(PAGE_BYTES)));
    }
    assert_eq!(plan(&short(3, 2), Bytes::default(), &[waiting(5)], 0).tokens, [5]);
}

/// What a simulated request asks for.
#[derive(Clone, Debug)]
struct Ask {
    arrives: usize,
    context: usize,
    prompt: usize,
    answer: usize,
    /// Its prompt is read in parts of so many tokens that are not cut.
    whole: Option<usize>,
    cancelled_after: Option<usize>,
}

impl Ask {
    fn longest(&self) -> usize {
        // The last token of an answer is never read.
        self.context + self.prompt + self.answer - 1
    }
}

#[derive(Clone, Debug)]
struct Simulated {
    ask: Ask,
    number: usize,
    age: u64,
    /// Tokens whose KV is held, the context's included.
    held: usize,
    /// Tokens' worth of work on the context.
    blended: usize,
    written: usize,
    steps: usize,
}

/// A simulated job.
#[derive(Clone, Debug)]
struct Computes {
    tokens: usize,
    left: usize,
    age: u64,
    begun: bool,
}

impl Computes {
    fn entry(&self) -> Entry {
        let entry = job(self.age, self.left, self.tokens);
        if self.begun { entry } else { Entry { own: Bytes::default(), ..entry } }
    }
}

impl Simulated {
    fn goal(&self) -> usize {
        self.ask.context + self.ask.prompt + self.written
    }

    fn entry(&self, running: bool) -> Entry {
        let rest = self.goal() - self.held;
        let work = match self.ask.whole {
            _ if self.blended < self.ask.context => {
                Work::Blend { tokens: self.ask.context - self.blended, takes: self.ask.context - self.held }
            }
            _ if rest == 1 && self.written > 0 => Work::Decode,
            Some(part) if self.held < self.ask.context + self.ask.prompt => {
                Work::Read { tokens: part.min(self.ask.context + self.ask.prompt - self.held), whole: true }
            }
            _ => Work::Read { tokens: rest, whole: false },
        };
        let own = if running { PAGE_BYTES.times(self.held.div_ceil(PAGE)) } else { Bytes::default() };
        let room = self.held.div_ceil(PAGE) * PAGE - self.held;
        Entry { work, ahead: rest, room, own, shared: Bytes::default(), age: self.age }
    }
}

fn ask() -> impl Strategy<Value = Ask> {
    let whole = prop_oneof![3 => Just(None), 1 => (1usize..40).prop_map(Some)];
    let context = prop_oneof![2 => Just(0), 1 => 1usize..200];
    let cancelled_after = prop_oneof![3 => Just(None), 1 => (0usize..60).prop_map(Some)];
    (0usize..150, context, 1usize..200, 1usize..120, whole, cancelled_after).prop_map(
        |(arrives, context, prompt, answer, whole, cancelled_after)| Ask {
            arrives,
            context,
            prompt,
            answer,
            whole,
            cancelled_after,
        },
    )
}

/// Runs all requests; checks every step. Returns how often a sequence was preempted.
fn simulate(limits: &Limits, asks: &[Ask]) -> usize {
    simulate_with_jobs(limits, asks, &[])
}

/// The same beside jobs that come at some time, with so many tokens.
fn simulate_with_jobs(limits: &Limits, asks: &[Ask], jobs: &[(usize, usize)]) -> usize {
    let total: usize =
        asks.iter().map(|a| a.longest() + a.context + 1).sum::<usize>() + jobs.iter().map(|j| j.1).sum::<usize>();
    let mut coming: Vec<(usize, Ask)> = asks.iter().cloned().enumerate().collect();
    coming.sort_by_key(|(_, a)| a.arrives);
    coming.reverse();
    let (mut queue, mut running): (Vec<Simulated>, usize) = (Vec::new(), 0);
    let mut computing: Vec<Computes> = Vec::new();
    let mut jobs: Vec<(usize, usize)> = jobs.to_vec();
    jobs.sort_unstable_by(|a, b| b.cmp(a));
    let mut age = 0;
    let mut ended = vec![0; asks.len()];
    let mut preempted = 0;
    // Alone, one after the other, each would take a step a token at most; preempted work comes on top.
    for now in 0.. {
        assert!(now < 150 + 20 * total, "no end: {queue:?}");
        while coming.last().is_some_and(|(_, a)| a.arrives <= now) {
            let (number, ask) = coming.pop().unwrap();
            age += 1;
            queue.push(Simulated { ask, number, age, held: 0, blended: 0, written: 0, steps: 0 });
        }
        while jobs.last().is_some_and(|(arrives, _)| *arrives <= now) {
            let (_, tokens) = jobs.pop().unwrap();
            age += 1;
            computing.push(Computes { tokens, left: tokens, age, begun: false });
        }
        for i in (0..queue.len()).rev() {
            queue[i].steps += 1;
            if queue[i].ask.cancelled_after.is_some_and(|n| queue[i].steps > n) {
                ended[queue.remove(i).number] += 1;
                running -= usize::from(i < running);
            }
        }
        if queue.is_empty() && computing.is_empty() {
            if coming.is_empty() && jobs.is_empty() {
                break;
            }
            continue;
        }
        let entries: Vec<Entry> = queue.iter().enumerate().map(|(i, s)| s.entry(i < running)).collect();
        let of_jobs: Vec<Entry> = computing.iter().map(Computes::entry).collect();
        let begun = computing.iter().filter(|job| job.begun).count();
        let used = used(&entries[..running]) + used(&of_jobs[..begun]);
        let step = super::plan(limits, &Queued { requests: &entries, running, jobs: &of_jobs, begun, used });
        check(limits, &queue, &entries, running, &of_jobs, &step);
        preempted += step.preempted.len();
        for place in step.preempted.iter().rev() {
            let gives_way = queue.remove(*place);
            running -= 1;
            queue.insert(running, Simulated { held: 0, blended: 0, ..gives_way });
        }
        if step.out_of_memory.is_some() {
            assert!(!limits.bytes(queue[0].ask.longest()).fits(limits.budget), "{:?} fits", queue[0].ask);
            ended[queue.remove(0).number] += 1;
            running = running.saturating_sub(1);
            continue;
        }
        running = step.tokens.len();
        for (s, tokens) in queue.iter_mut().zip(&step.tokens) {
            if s.blended < s.ask.context {
                s.held = if *tokens > 0 { s.ask.context } else { s.held };
                s.blended += tokens;
            } else {
                s.held += tokens;
                s.written += usize::from(s.held == s.goal());
            }
        }
        for (job, tokens) in computing.iter_mut().zip(&step.jobs) {
            job.begun = true;
            job.left -= tokens;
        }
        computing.retain(|job| job.left > 0);
        for i in (0..running).rev() {
            if queue[i].written == queue[i].ask.answer {
                ended[queue.remove(i).number] += 1;
                running -= 1;
            }
        }
    }
    assert!(ended.iter().all(|n| *n == 1), "each request ends once: {ended:?}");
    preempted
}

/// What holds for every step.
fn check(limits: &Limits, queue: &[Simulated], entries: &[Entry], running: usize, jobs: &[Entry], step: &Step) {
    // All hold something of both memories here: then it is the youngest that give way.
    let went_on = running - step.preempted.len();
    assert_eq!(step.preempted, (went_on..running).collect::<Vec<_>>());
    assert!(step.tokens.len() <= limits.max_sequences.max(running));
    if step.out_of_memory.is_some() {
        assert_eq!(step.tokens, [0]);
        return;
    }
    // Who holds its memory goes on or lets the oldest: nothing stands still.
    let goes_on = |tokens: &[usize]| tokens.first().is_some_and(|tokens| *tokens > 0);
    assert!(goes_on(&step.tokens) || goes_on(&step.jobs), "the oldest goes on in every step");
    assert!(goes_on(&step.tokens) || running == 0 || jobs.iter().any(|job| job.own != Bytes::default()));
    let held: Bytes =
        step.tokens.iter().zip(entries).zip(queue).map(|((n, e), s)| limits.bytes(s.held + e.work.takes(*n))).sum();
    let held = held + step.jobs.iter().zip(jobs).map(|(_, job)| limits.bytes(job.ahead)).sum();
    assert!(step.jobs.len() <= JOBS && held.fits(limits.budget), "{held:?} of {:?}", limits.budget);
    let decoding = |e: &&Entry| e.work == Work::Decode;
    for (entry, tokens) in entries.iter().zip(&step.tokens).take(went_on) {
        let waits = *tokens == 0 && jobs.iter().any(|job| job.own != Bytes::default());
        assert!(entry.work != Work::Decode || *tokens == 1 || waits, "who decodes is in every step");
    }
    // One unit that cannot be cut may exceed the budget, then nothing else is read beside it.
    let units: Vec<usize> = entries
        .iter()
        .zip(&step.tokens)
        .filter(|(e, n)| **n > 0 && e.work != Work::Decode)
        .map(|(_, n)| *n)
        .chain(step.jobs.iter().copied().filter(|n| *n > 0))
        .collect();
    let before = entries[..running].iter().filter(decoding).count();
    let most = if before > 0 { limits.mixed_prefill_tokens } else { usize::MAX };
    let left = limits.step_tokens.saturating_sub(before).min(most).max(1);
    assert!(units.len() == 1 || units.iter().sum::<usize>() <= left, "{units:?} in {left}");
    if let [one] = units[..] {
        let cut =
            |(e, n): (&Entry, &usize)| *n == one && !matches!(e.work, Work::Decode | Work::Read { whole: true, .. });
        let cut = entries.iter().zip(&step.tokens).any(cut);
        assert!(!cut || one <= left);
    }
}

#[test]
fn many_that_outgrow_the_memory_are_preempted_and_end() {
    let ask = Ask { arrives: 0, context: 0, prompt: 10, answer: 100, whole: None, cancelled_after: None };
    let preempted = simulate(&limits(64, 8, 12), &vec![ask.clone(); 8]);
    assert!(preempted > 0);
    assert_eq!(simulate(&limits(64, 8, 8 * 7), &vec![ask; 8]), 0, "with room for all nobody gives way");
}

#[test]
fn an_answer_goes_on_while_long_prompts_are_read() {
    let talk = Ask { arrives: 0, context: 0, prompt: 4, answer: 50, whole: None, cancelled_after: None };
    let long = Ask { arrives: 1, prompt: 5000, answer: 1, ..talk.clone() };
    // `check` asserts that whoever decodes is in every step; here that the prompts are read meanwhile.
    let asks = [talk, long.clone(), long];
    assert_eq!(simulate(&limits(33, 8, 1000), &asks), 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn every_request_ends_once_and_no_budget_is_exceeded(
        asks in prop::collection::vec(ask(), 1..25),
        step_tokens in 1usize..100,
        mixed_prefill_tokens in 1usize..100,
        max_sequences in 1usize..10,
        pages in 1usize..60,
    ) {
        simulate(&Limits { mixed_prefill_tokens, ..limits(step_tokens, max_sequences, pages) }, &asks);
    }

    #[test]
    fn every_job_ends_too_and_costs_no_budget(
        asks in prop::collection::vec(ask(), 0..15),
        jobs in prop::collection::vec((0usize..150, 1usize..400), 1..12),
        step_tokens in 1usize..100,
        mixed_prefill_tokens in 1usize..100,
        max_sequences in 1usize..6,
        pages in 1usize..60,
    ) {
        // One that is larger than all there is would not have been taken.
        let jobs: Vec<(usize, usize)> = jobs.into_iter().map(|(at, n)| (at, n.min(pages * PAGE))).collect();
        simulate_with_jobs(&Limits { mixed_prefill_tokens, ..limits(step_tokens, max_sequences, pages) }, &asks, &jobs);
    }

    #[test]
    fn any_state_has_a_plan(
        entries in prop::collection::vec((0usize..4, 0usize..300, 0usize..16, 0usize..9, 0usize..9), 1..12),
        running in 0usize..12,
        pages in 0usize..40,
    ) {
        // Shared pages and sums that do not add up included: measured bytes of indexes need not follow pages.
        let queue: Vec<Entry> = entries
            .iter()
            .map(|&(kind, tokens, room, own, shared)| {
                let work = match kind {
                    0 => Work::Blend { tokens: tokens.max(1), takes: 3 * tokens },
                    1 => Work::Decode,
                    _ => Work::Read { tokens: tokens.max(1), whole: kind == 2 },
                };
                let (own, shared) = (PAGE_BYTES.times(own), PAGE_BYTES.times(shared));
                Entry { work, ahead: tokens.max(1), room, own, shared, age: 0 }
            })
            .collect();
        let running = running.min(queue.len());
        let used = used(&queue[..running]) + queue[..running].iter().map(|e| e.shared).sum();
        let step = plan(&limits(20, 8, pages), used, &queue, running);
        prop_assert!(step.out_of_memory.is_none() || step.tokens.len() == 1);
        prop_assert!(!step.tokens.is_empty());
        prop_assert!(!step.preempted.contains(&0) && step.preempted.is_sorted());
        let stay = running - step.preempted.len();
        prop_assert!(step.out_of_memory.is_some() || step.tokens.len() >= stay);
        prop_assert!(step.preempted.is_empty() || step.tokens.len() <= stay, "nobody is let in while some give way");
        // Who holds nothing gives way for nothing.
        let holds = |e: &Entry| e.own != Bytes::default() || e.shared != Bytes::default();
        prop_assert!(step.preempted.iter().all(|place| holds(&queue[*place])));
        prop_assert!(step.out_of_memory.is_some() || step.tokens[0] > 0);
    }
}

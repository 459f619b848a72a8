//! A team of threads for jobs of a few microseconds and more.
//!
//! Waking a thread pool takes longer than a small product. Here the caller publishes a job and
//! starts on it at once; team members spin for a short time after their last job, so that in a run
//! of jobs they join within a microsecond, and sleep otherwise. Tasks are drawn from a counter, and
//! the caller never waits for a member that has not joined yet.
//!
//! One job runs at a time. A caller that finds the team busy does all of its job itself: several
//! callers at once use their own threads and never more than the members in addition.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::thread::Thread;
use std::time::{Duration, Instant};

/// How long a member spins for the next job before it sleeps.
const SPIN: Duration = Duration::from_micros(100);

/// Most members of a team.
const MAX_MEMBERS: usize = 1023;

/// What members run: they draw tasks until there are none.
type Job = *const (dyn Fn() + Sync);

/// The one word that caller and members agree by: which job is open, how many may still join it, and
/// how many are at work on it.
#[derive(Clone, Copy)]
struct State(u64);

impl State {
    const SEAT: u64 = 1 << 16;
    const SEATS: u64 = 0xffff << 16;

    fn open(job: u32, seats: usize) -> State {
        State(u64::from(job) << 32 | (seats as u64) << 16)
    }

    fn job(self) -> u32 {
        (self.0 >> 32) as u32
    }

    fn seats(self) -> u64 {
        (self.0 & Self::SEATS) >> 16
    }

    fn working(self) -> u64 {
        self.0 & 0xffff
    }
}

/// What caller and members share.
struct Shared {
    state: AtomicU64,
    /// The open job. Written by the caller that holds the team while no member works or can join;
    /// read by members that have joined.
    job: UnsafeCell<Option<Job>>,
    /// The panic of a member, for the caller.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `state` says who may touch `job` when, see there; the job itself is `Sync` and outlives
// every member's work on it, since the caller waits for those who have joined.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

/// A member, as the caller sees it.
struct Member {
    thread: Thread,
    asleep: Arc<AtomicBool>,
}

/// The members, and the number of the last job.
struct Team {
    /// The process that started the members: threads do not survive a fork. (A child that was
    /// forked in the middle of a job finds the team busy for ever, and works without.)
    process: u32,
    job: u32,
    shared: Arc<Shared>,
    members: Vec<Member>,
}

static TEAM: Mutex<Option<Team>> = Mutex::new(None);

/// Runs `work` for every task from 0 to `tasks`, on the caller's thread and at most `threads - 1`
/// others.
///
/// # Panics
/// If `work` does, after all threads have left it.
pub(crate) fn for_each(threads: usize, tasks: usize, work: &(dyn Fn(usize) + Sync)) {
    let helpers = threads.min(tasks).saturating_sub(1);
    if helpers == 0 {
        (0..tasks).for_each(work);
        return;
    }
    let next = AtomicUsize::new(0);
    let draw = || {
        loop {
            let task = next.fetch_add(1, Ordering::Relaxed);
            if task >= tasks {
                break;
            }
            work(task);
        }
    };
    let mut team = match TEAM.try_lock() {
        Ok(team) => team,
        // A job of an earlier caller panicked, after it was closed: the team is sound.
        Err(TryLockError::Poisoned(team)) => team.into_inner(),
        Err(TryLockError::WouldBlock) => return draw(),
    };
    let team = team.get_or_insert_with(Team::new);
    if team.process != std::process::id() {
        *team = Team::new();
    }
    team.run(helpers.min(MAX_MEMBERS), &draw);
}

impl Team {
    fn new() -> Team {
        Team {
            process: std::process::id(),
            job: 0,
            shared: Arc::new(Shared {
                state: AtomicU64::new(State::open(0, 0).0),
                job: UnsafeCell::new(None),
                panic: Mutex::new(None),
            }),
            members: Vec::new(),
        }
    }

    /// Runs `work` on the caller's thread and on up to `helpers` members, each once.
    fn run(&mut self, helpers: usize, work: &(dyn Fn() + Sync)) {
        while self.members.len() < helpers {
            let Ok(member) = Member::start(&self.shared, self.members.len(), self.job) else {
                break;
            };
            self.members.push(member);
        }
        self.job = self.job.wrapping_add(1);
        // SAFETY: the lifetime is only forgotten: `Close` below waits, even in a panic, until no
        // member works on the job nor can join it, before `work` ends.
        let job = unsafe { std::mem::transmute::<*const (dyn Fn() + Sync + '_), Job>(work) };
        // A caller that panics itself leaves the panics of its members behind.
        *self.shared.panic.lock().unwrap_or_else(PoisonError::into_inner) = None;
        // SAFETY: the last job was closed and nobody works on it, so no member reads this now.
        unsafe { *self.shared.job.get() = Some(job) };
        let close = Close(&self.shared);
        let seats = helpers.min(self.members.len());
        self.shared.state.store(State::open(self.job, seats).0, Ordering::SeqCst);
        for member in &self.members[..seats] {
            // In one order with the member's own: either it sees the job, or we see it asleep.
            if member.asleep.swap(false, Ordering::SeqCst) {
                member.thread.unpark();
            }
        }
        work();
        drop(close);
        let panic = self.shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

/// Closes the job when dropped, and waits for those who have joined it.
struct Close<'a>(&'a Shared);

impl Drop for Close<'_> {
    fn drop(&mut self) {
        self.0.state.fetch_and(!State::SEATS, Ordering::AcqRel);
        let mut spins = 0u32;
        while State(self.0.state.load(Ordering::Acquire)).working() > 0 {
            spins += 1;
            // A member that has lost its CPU needs one to finish.
            if spins.is_multiple_of(1024) {
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
    }
}

impl Member {
    fn start(shared: &Arc<Shared>, index: usize, last_job: u32) -> std::io::Result<Member> {
        let asleep = Arc::new(AtomicBool::new(false));
        let (shared, sleeps) = (shared.clone(), asleep.clone());
        let thread = std::thread::Builder::new()
            .name(format!("birkhoff-linear-{index}"))
            .spawn(move || shared.serve(&sleeps, last_job))?;
        Ok(Member { thread: thread.thread().clone(), asleep })
    }
}

impl Shared {
    /// The life of a member.
    fn serve(&self, asleep: &AtomicBool, mut last_job: u32) {
        loop {
            let state = self.await_job(asleep, last_job);
            last_job = state.job();
            if self.join(last_job) {
                // SAFETY: having joined, we may read the job until we leave, and it lives.
                let job = unsafe { (*self.job.get()).expect("an open job") };
                // SAFETY: as above.
                let outcome = catch_unwind(AssertUnwindSafe(|| unsafe { (*job)() }));
                if let Err(panic) = outcome {
                    *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
                }
                self.state.fetch_sub(1, Ordering::AcqRel);
            }
        }
    }

    /// Waits for a job other than `last_job`.
    fn await_job(&self, asleep: &AtomicBool, last_job: u32) -> State {
        let news = || {
            let state = State(self.state.load(Ordering::SeqCst));
            (state.job() != last_job).then_some(state)
        };
        let start = Instant::now();
        loop {
            for _ in 0..64 {
                if let Some(state) = news() {
                    return state;
                }
                std::hint::spin_loop();
            }
            if start.elapsed() < SPIN {
                continue;
            }
            asleep.store(true, Ordering::SeqCst);
            while news().is_none() && asleep.load(Ordering::SeqCst) {
                std::thread::park();
            }
            asleep.store(false, Ordering::SeqCst);
        }
    }

    /// Takes a seat of job `job`, if it is still open and one is left.
    fn join(&self, job: u32) -> bool {
        let mut state = State(self.state.load(Ordering::Acquire));
        while state.job() == job && state.seats() > 0 {
            let joined = state.0 - State::SEAT + 1;
            match self.state.compare_exchange_weak(
                state.0,
                joined,
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => return true,
                Err(now) => state = State(now),
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How often each task has run.
    fn counts(threads: usize, tasks: usize) -> Vec<usize> {
        let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
        for_each(threads, tasks, &|task| {
            counts[task].fetch_add(1, Ordering::Relaxed);
        });
        counts.into_iter().map(AtomicUsize::into_inner).collect()
    }

    #[test]
    fn every_task_runs_once() {
        for threads in [0, 1, 2, 5] {
            for tasks in [0, 1, 2, 7, 1000] {
                for _ in 0..50 {
                    assert_eq!(counts(threads, tasks), vec![1; tasks]);
                }
            }
        }
    }

    #[test]
    fn members_that_sleep_are_woken() {
        for _ in 0..20 {
            std::thread::sleep(SPIN * 3);
            assert_eq!(counts(3, 100), vec![1; 100]);
        }
    }

    #[test]
    fn callers_do_not_wait_for_each_other() {
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        assert_eq!(counts(4, 20), vec![1; 20]);
                    }
                });
            }
        });
    }

    #[test]
    fn a_job_within_a_job_runs() {
        let total = AtomicUsize::new(0);
        for_each(3, 10, &|_| {
            for_each(3, 10, &|_| {
                total.fetch_add(1, Ordering::Relaxed);
            });
        });
        assert_eq!(total.into_inner(), 100);
    }

    #[test]
    fn panics_reach_the_caller_and_the_team_lives_on() {
        for _ in 0..20 {
            let outcome = catch_unwind(|| {
                for_each(3, 50, &|task| assert_ne!(task, 20, "task 20"));
            });
            assert!(outcome.is_err());
            assert_eq!(counts(3, 50), vec![1; 50]);
        }
    }
}

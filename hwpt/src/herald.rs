//! The herald: a thread that tells the watchers of a queue on the CPU where they sleep.
//!
//! Whoever brings news to a queue is a device on another CPU than the client that sleeps in poll(2). To wake somebody
//! across CPUs, out of an idle one, takes longer than the calls by which he then reads and answers a page request; in a
//! virtual machine both the interrupt and the end of the idling are exits. A device that has missed a page will soon miss
//! the next, so where the watchers of a queue did not sleep longer than [`PATIENCE`] last time, the herald stays awake on
//! their CPU this time, for as long at most; the bringer leaves the news at the queue's [`Post`], and the herald wakes who
//! sleeps beside it. (KVM's halt polling decides by the same rule: Linux `Documentation/virt/kvm/halt-polling.rst`.)
//!
//! The herald runs at idle priority: it has of a CPU what nobody else wants, and gives way to whoever wakes there.
//! Therefore nobody depends on it. News that it has not taken within [`HANDOVER`] are taken back and told by who brought
//! them, and the queue is left out next time. If it loses the CPU after it has taken them, it tells them late; so only who
//! waits for an answer, and can tell them again, leaves news with it. And it holds no lock, ever: a thread that does not
//! get to run would keep it.
//!
//! There is one herald for the process, at one post at a time; at all others, and where the machine has one CPU, the
//! bringer tells.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, OnceLock};
use std::thread::Thread;
use std::time::{Duration, Instant};

use crossbeam_utils::atomic::AtomicCell;

use crate::watchers::Watcher;

/// How long the herald stays awake at a post, and how long its watchers may have slept last time.
const PATIENCE: Duration = Duration::from_micros(500);
/// How long news lie at a post before their bringer takes them back.
const HANDOVER: Duration = Duration::from_micros(5);

/// The herald is not here.
const ABSENT: u8 = 0;
/// The herald looks for news.
const ATTENDED: u8 = 1;
/// News have been left for the herald.
const LEFT: u8 = 2;

/// Where the news of one queue are left.
pub(crate) struct Post {
    /// [`ABSENT`], [`ATTENDED`] or [`LEFT`]. What lies in `news` is told by whoever takes it out, whatever this says.
    state: AtomicU8,
    news: AtomicCell<Option<Arc<Vec<Watcher>>>>,
    /// When the watchers fell asleep that are to be told next: nanoseconds, see [`now`].
    since: AtomicU64,
    /// For how many nanoseconds the last ones slept; `u64::MAX` when it is not known, or the herald came too late.
    slept: AtomicU64,
}

impl Default for Post {
    fn default() -> Self {
        let (state, news) = (AtomicU8::new(ABSENT), AtomicCell::new(None));
        Self { state, news, since: AtomicU64::new(0), slept: AtomicU64::new(u64::MAX) }
    }
}

impl Post {
    /// Somebody who watches is about to sleep on the calling thread's CPU.
    pub(crate) fn sleeps(self: &Arc<Self>) {
        self.since.store(now(), Ordering::Relaxed);
        if self.slept.load(Ordering::Relaxed) <= PATIENCE.as_nanos() as u64
            && let Some(herald) = Herald::get()
            && let Some(cpu) = ioas::thread::cpu()
        {
            herald.call(Order { post: Arc::clone(self), cpu });
        }
    }

    /// Tells each of `news`, or has the herald do it. Takes [`HANDOVER`] at most, and what the watchers take.
    pub(crate) fn deliver(&self, news: &Arc<Vec<Watcher>>) {
        self.slept.store(now().saturating_sub(self.since.load(Ordering::Relaxed)), Ordering::Relaxed);
        if self.state.load(Ordering::Acquire) == ABSENT {
            return tell(news);
        }
        // Somebody else's may lie there, who is waiting for the herald.
        self.news.swap(Some(Arc::clone(news))).iter().for_each(|before| tell(before));
        if self.state.compare_exchange(ATTENDED, LEFT, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
            let left = Instant::now();
            while self.state.load(Ordering::Acquire) == LEFT && left.elapsed() < HANDOVER {
                std::hint::spin_loop();
            }
        }
        if let Some(late) = self.news.take() {
            let _ = self.state.compare_exchange(LEFT, ABSENT, Ordering::SeqCst, Ordering::SeqCst);
            self.slept.store(u64::MAX, Ordering::Relaxed);
            tell(&late);
        }
    }

    /// The herald's work: waits for news, at most [`PATIENCE`], and tells them.
    fn attend(&self) {
        let begun = Instant::now();
        self.state.store(ATTENDED, Ordering::SeqCst);
        loop {
            match self.state.load(Ordering::Acquire) {
                // Taken back.
                ABSENT => return,
                LEFT => {
                    let news = self.news.take();
                    let _ = self.state.compare_exchange(LEFT, ABSENT, Ordering::SeqCst, Ordering::SeqCst);
                    return news.iter().for_each(|news| tell(news));
                }
                _ if begun.elapsed() > PATIENCE => {
                    let _ = self.state.compare_exchange(ATTENDED, ABSENT, Ordering::SeqCst, Ordering::SeqCst);
                }
                _ => std::hint::spin_loop(),
            }
        }
    }
}

fn tell(news: &[Watcher]) {
    news.iter().for_each(|watcher| watcher());
}

/// Nanoseconds of a clock that only goes forward.
fn now() -> u64 {
    static BEGINNING: LazyLock<Instant> = LazyLock::new(Instant::now);
    BEGINNING.elapsed().as_nanos() as u64
}

/// Where the herald is wanted.
struct Order {
    post: Arc<Post>,
    cpu: usize,
}

/// How the herald is reached.
struct Herald {
    thread: Thread,
    /// Where it is to go when it has nothing to do; the last one counts.
    order: Arc<AtomicCell<Option<Box<Order>>>>,
}

impl Herald {
    /// The process's herald, which is started when it is first wanted. `None` where there can be none.
    fn get() -> Option<&'static Self> {
        static HERALD: OnceLock<Option<Herald>> = OnceLock::new();
        HERALD.get_or_init(Self::start).as_ref()
    }

    fn start() -> Option<Self> {
        let order = Arc::new(AtomicCell::new(None));
        let orders = Arc::clone(&order);
        let thread = ioas::thread::spawn("herald", move || {
            // Asked here: the thread that starts this one may be bound to a CPU.
            let alone = std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() == 1);
            if !alone && ioas::thread::give_way() {
                serve(&orders);
            }
        });
        Some(Self { thread: thread.ok()?.thread().clone(), order })
    }

    fn call(&self, order: Order) {
        self.order.store(Some(Box::new(order)));
        self.thread.unpark();
    }
}

/// The herald's life.
fn serve(orders: &AtomicCell<Option<Box<Order>>>) -> ! {
    let mut bound = None;
    loop {
        let Some(order) = orders.take() else {
            std::thread::park();
            continue;
        };
        if bound != Some(order.cpu) {
            bound = ioas::thread::bind(order.cpu).then_some(order.cpu);
        }
        if bound.is_some() {
            order.post.attend();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    /// News that count how often they are told.
    fn counted(told: &Arc<AtomicUsize>) -> Arc<Vec<Watcher>> {
        let told = Arc::clone(told);
        let watcher = move || {
            told.fetch_add(1, Ordering::SeqCst);
        };
        Arc::new(vec![Arc::new(watcher)])
    }

    fn attended(post: &Arc<Post>) -> std::thread::JoinHandle<()> {
        let attending = Arc::clone(post);
        let herald = std::thread::spawn(move || attending.attend());
        while post.state.load(Ordering::SeqCst) != ATTENDED && !herald.is_finished() {
            std::thread::yield_now();
        }
        herald
    }

    #[test]
    fn cell_of_news_takes_no_lock() {
        assert!(AtomicCell::<Option<Arc<Vec<Watcher>>>>::is_lock_free());
        assert!(AtomicCell::<Option<Box<Order>>>::is_lock_free());
    }

    #[test]
    fn news_are_told_once_whether_the_herald_is_there_or_not() {
        let (post, told) = (Arc::new(Post::default()), Arc::new(AtomicUsize::new(0)));
        post.deliver(&counted(&told));
        assert_eq!(told.load(Ordering::SeqCst), 1);
        for round in 0..200 {
            let herald = attended(&post);
            post.deliver(&counted(&told));
            herald.join().expect("the herald");
            assert_eq!(told.load(Ordering::SeqCst), round + 2);
            assert_eq!(post.state.load(Ordering::SeqCst), ABSENT);
        }
    }

    #[test]
    fn news_of_many_bringers_are_each_told_once() {
        const BRINGERS: usize = 4;
        const ROUNDS: usize = 300;
        let (post, told) = (Arc::new(Post::default()), Arc::new(AtomicUsize::new(0)));
        for _ in 0..ROUNDS {
            let herald = attended(&post);
            std::thread::scope(|scope| {
                (0..BRINGERS).for_each(|_| drop(scope.spawn(|| post.deliver(&counted(&told)))));
            });
            herald.join().expect("the herald");
        }
        assert_eq!(told.load(Ordering::SeqCst), BRINGERS * ROUNDS);
        assert!(post.news.take().is_none());
    }

    #[test]
    fn news_that_the_herald_does_not_take_are_told_by_who_brought_them_and_it_is_not_called_again() {
        let (post, told) = (Arc::new(Post::default()), Arc::new(AtomicUsize::new(0)));
        post.since.store(now(), Ordering::SeqCst);
        // A herald that never gets to run.
        post.state.store(ATTENDED, Ordering::SeqCst);
        post.deliver(&counted(&told));
        assert_eq!(told.load(Ordering::SeqCst), 1);
        assert_eq!((post.state.load(Ordering::SeqCst), post.slept.load(Ordering::SeqCst)), (ABSENT, u64::MAX));
    }

    #[test]
    fn herald_that_waits_in_vain_goes() {
        let post = Arc::new(Post::default());
        attended(&post).join().expect("the herald");
        assert_eq!(post.state.load(Ordering::SeqCst), ABSENT);
    }
}

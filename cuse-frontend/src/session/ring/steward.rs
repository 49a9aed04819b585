//! The steward: the one thread that owns the entries nobody else owns, and that never blocks.
//!
//! It makes entries, commits the answers that another thread than the entry's owner gave, and hands the requests that
//! arrive in its entries to the hands of their CPU, together with the entry. It looks at no client's memory and makes
//! no call of what is served, so a request that blocks can neither hold it up nor take its entries with it.
//!
//! **A kick.** Linux (up to 7.3 at least) gives a request that found no free entry to the next entry that is *committed*;
//! an entry that is new does not count. So when every entry of a queue is held by a request that blocks, whatever waits
//! behind them would wait for one of those, however many entries we add. The steward therefore makes the kernel send
//! a request of its own (NOTIFY_RETRIEVE of a file that is in use is answered by a NOTIFY_REPLY, which goes to a free
//! entry of the CPU that asks) and answers that: the commit fetches what waits. It does so whenever it has made entries,
//! since only the kernel knows whether there was a moment without a free one; and whoever finds that a kick has fetched
//! something asks for another.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use ioas::killpoint;

use super::entry::{self, Entry, EntryRing};
use super::post::Order;
use super::queue::DEPTH;
use super::seat::Seat;
use super::{Arrival, Desk, Rings};
use crate::sys::ring::Told;

/// Submissions of the steward's ring at a time, and completions that it has room for.
const SUBMISSIONS: u32 = 64;
const COMPLETIONS: u32 = 4096;
/// How often the kernel is asked again to take the first entries, when it has not digested the answer of INIT.
const ATTEMPTS: usize = 100;

/// See the top of the file.
pub(super) struct Steward<D: Desk> {
    rings: Arc<Rings<D>>,
    desk: Arc<D>,
    ring: EntryRing,
    seat: Arc<Seat>,
    /// Entries of kicks whose answers are to be submitted.
    kicked: Vec<Arc<Entry>>,
}

impl<D: Desk> Steward<D> {
    /// Makes the steward, on its own thread.
    ///
    /// # Errors
    /// As io_uring_setup(2): the machine or the kernel has no rings for us.
    pub(super) fn new(rings: Arc<Rings<D>>, desk: Arc<D>) -> std::io::Result<Self> {
        let mut ring = EntryRing::new(SUBMISSIONS, COMPLETIONS)?;
        let seat = rings.seats.take(Arc::clone(rings.post.event()));
        ring.watch(seat.event())?;
        Ok(Self { rings, desk, ring, seat, kicked: Vec::new() })
    }

    /// Works until the session ends.
    pub(super) fn work(mut self) {
        let mut told = Vec::new();
        while !self.rings.ended.load(Ordering::Acquire) {
            let wanted = u32::from(self.may_sleep());
            let waited = self.ring.enter(wanted).and_then(|()| self.ring.told(&mut told));
            if let Err(error) = waited {
                tracing::error!(%error, "the ring of the steward has failed");
                return;
            }
            self.take(&mut told);
            self.seat.look();
            for order in self.rings.post.take() {
                self.carry_out(order);
            }
            if let Err(error) = self.follow_kicks(&mut told) {
                tracing::error!(%error, "the ring of the steward has failed");
                return;
            }
        }
    }

    /// The steward is about to enter the kernel. False when it must not sleep there. Carrying out an order, it may
    /// have heard the event of a later one.
    fn may_sleep(&self) -> bool {
        self.seat.sit() && self.rings.post.is_empty()
    }

    /// Takes what the ring has told.
    fn take(&mut self, told: &mut Vec<Told<entry::About>>) {
        for told in told.drain(..) {
            let Told::Slot(entry, result) = told else {
                self.seat.heard();
                continue;
            };
            match self.rings.arrival(entry, result, &*self.desk) {
                Arrival::Gone => {}
                Arrival::Kick(entry, unique) => {
                    self.kicked.push(Arc::clone(&entry));
                    self.commit(entry, unique);
                }
                Arrival::Request(given) => self.rings.give(given, &self.desk),
            }
        }
    }

    /// Commits the answers of kicks, and kicks again where that has fetched a request: it comes back at once.
    fn follow_kicks(&mut self, told: &mut Vec<Told<entry::About>>) -> std::io::Result<()> {
        while !self.kicked.is_empty() {
            let kicked = std::mem::take(&mut self.kicked);
            self.ring.enter(0)?;
            self.ring.told(told)?;
            for told in &*told {
                if let Told::Slot(entry, 0) = told
                    && kicked.iter().any(|kicked| Arc::ptr_eq(kicked, entry))
                {
                    self.rings.post.order(Order::Kick(usize::from(entry.note.cpu)));
                }
            }
            self.take(told);
        }
        Ok(())
    }

    fn carry_out(&mut self, order: Order) {
        killpoint::pass(order.name());
        match order {
            Order::Begin => self.begin(),
            Order::Commit(entry, unique) => self.commit(entry, unique),
            Order::Replenish(cpu) => {
                self.add(cpu);
                if self.submit() {
                    self.rings.queues[cpu].replenished();
                    self.kick(cpu);
                }
            }
            Order::Kick(cpu) => self.kick(cpu),
        }
    }

    fn commit(&mut self, entry: Arc<Entry>, unique: u64) {
        self.rings.queues[usize::from(entry.note.cpu)].gives();
        if let Err(error) = entry::commit(&mut self.ring, self.rings.device(), entry, unique) {
            tracing::error!(%error, "an answer cannot be submitted");
        }
    }

    /// Registers the first entries of every queue. Until all queues have one the kernel lets no client in.
    fn begin(&mut self) {
        for cpu in 0..self.rings.queues.len() {
            self.add(cpu);
        }
        let works = self.submit();
        let _ = self.rings.works.set(works);
        if works {
            tracing::debug!(queues = self.rings.queues.len(), "requests travel over io_uring");
        }
    }

    /// Prepares [`DEPTH`] new entries for a queue.
    fn add(&mut self, cpu: usize) {
        for _ in 0..DEPTH {
            let added = self.rings.new_entry(cpu).and_then(|entry| {
                self.rings.queues[cpu].adds(&entry);
                entry::register(&mut self.ring, self.rings.device(), entry)
            });
            if let Err(error) = added {
                tracing::error!(%error, cpu, "no further ring entry");
                return;
            }
        }
    }

    /// Submits new entries, and looks whether the kernel takes them: it says nothing when it does.
    fn submit(&mut self) -> bool {
        killpoint::pass("ring: new entries are about to be submitted");
        let mut told = Vec::new();
        for _ in 0..ATTEMPTS {
            let submitted = self.ring.enter(0).and_then(|()| self.ring.told(&mut told));
            if let Err(error) = submitted {
                tracing::error!(%error, "ring entries cannot be submitted");
                return false;
            }
            let early = |told: &Told<_>| matches!(told, Told::Slot(_, result) if *result == -libc::EAGAIN);
            if !told.iter().any(early) {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
            for told in told.extract_if(.., |told| early(told)) {
                let Told::Slot(entry, _) = told else { continue };
                let _ = entry::register(&mut self.ring, self.rings.device(), entry);
            }
        }
        let refusal = told.iter().find_map(|told| match told {
            Told::Slot(_, result) if *result < 0 => Some(std::io::Error::from_raw_os_error(-result)),
            _ => None,
        });
        if let Some(error) = &refusal {
            tracing::warn!(%error, "the kernel takes no ring entries");
        }
        self.take(&mut told);
        refusal.is_none()
    }

    /// See the top of the file. Where no request is under way whose file could be asked for, the next one brings it up.
    fn kick(&self, cpu: usize) {
        let queue = &self.rings.queues[cpu];
        if !ioas::thread::bind(cpu) {
            return;
        }
        let unique = self.rings.next_kick();
        if !queue.nodes().into_iter().any(|node| self.rings.channel.retrieve(unique, node)) {
            queue.owes_kick();
        }
        ioas::thread::roam();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::channel::Channel;
    use crate::session::ring::Turn;
    use crate::wire::InHeader;

    struct Nobody;

    impl Desk for Nobody {
        type Job = ();

        fn note(&self, _: InHeader, _: Vec<u8>, _: Arc<Turn>) {}

        fn work(&self, (): ()) {}
    }

    #[test]
    fn order_whose_event_was_heard_while_others_were_carried_out_is_not_slept_over() {
        let device = std::fs::File::open("/dev/null").expect("null");
        let rings = Rings::new(Arc::new(Channel::new(device.into())), 4096).expect("memory");
        let mut steward = match Steward::new(Arc::clone(&rings), Arc::new(Nobody)) {
            Ok(steward) => steward,
            Err(error) => return println!("Skipped(no io_uring: {error})"),
        };
        rings.post.order(Order::Kick(0));
        assert_eq!(rings.post.take().len(), 1);
        rings.post.order(Order::Kick(1));
        steward.ring.enter(1).expect("the event");
        let mut told = Vec::new();
        steward.ring.told(&mut told).expect("completions");
        steward.take(&mut told);
        assert!(!steward.may_sleep(), "nobody will say again that there is an order");
        assert_eq!(rings.post.take().len(), 1);
        assert!(steward.may_sleep());
    }
}

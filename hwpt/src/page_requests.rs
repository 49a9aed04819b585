//! `FaultQueue`: DMA that waits for a page, until the client says that it is there or will not come.
//!
//! A device (or one of its PASIDs) that is attached to a fault-capable page table has a [`FaultRoute`]. What it misses
//! it *raises*: one or more [`PageRequest`]s that are answered together. The group lies in the queue until a client
//! reads it, which gives it a cookie, and is held under that cookie until a response comes. Its `answer` is called
//! exactly once: with the client's response, or with [`Response::Invalid`] when the route closes because the device
//! is detached or moved elsewhere.
//!
//! Cookies are the lowest free number from 1. The queue's lock is a leaf: answers are called and watchers told after it
//! was let go.
//!
//! Source: Linux `drivers/iommu/iommufd/eventq.c` (`iommufd_fault_*`, `iommufd_auto_response_faults`).

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::watchers::Watchers;

bitflags::bitflags! {
    /// What a page request says of itself.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct RequestFlags: u32 {
        /// The PASID field means something.
        const PASID_VALID = 1;
        /// The last of its group.
        const LAST_PAGE = 2;
    }
}

bitflags::bitflags! {
    /// What the device wanted to do with the page.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Permission: u32 {
        /// Read.
        const READ = 1;
        /// Write.
        const WRITE = 2;
        /// Execute.
        const EXECUTE = 4;
        /// In privileged mode.
        const PRIVILEGED = 8;
    }
}

/// One page that a device asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRequest {
    /// What of it means anything.
    pub flags: RequestFlags,
    /// The PASID, if the flags say so.
    pub pasid: u32,
    /// The device's name for the group.
    pub group: u32,
    /// What it wanted.
    pub permission: Permission,
    /// The address.
    pub address: u64,
}

/// How a group of page requests ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Response {
    /// The pages are there: try again.
    Success,
    /// They will not come.
    Invalid,
}

/// Told how a group ended.
pub type Answer = Box<dyn FnOnce(Response) + Send>;

struct Held {
    route: u64,
    device: u32,
    requests: Arc<[PageRequest]>,
    answer: Answer,
}

#[derive(Default)]
struct State {
    /// Not read yet.
    arrived: VecDeque<Held>,
    /// Read, by cookie.
    waiting: BTreeMap<u32, Held>,
}

/// What a reader finds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Read {
    /// Nothing.
    Empty,
    /// A group that is larger than the reader's room.
    TooLarge,
    /// A group, now held under `cookie`.
    Group {
        /// What the response names it by.
        cookie: u32,
        /// The client's name for the device.
        device: u32,
        /// Its requests.
        requests: Arc<[PageRequest]>,
    },
}

/// A queue of page requests.
#[derive(Default)]
#[doc(alias = "iommufd_fault")]
pub struct FaultQueue {
    state: Mutex<State>,
    watchers: Watchers,
}

impl FaultQueue {
    /// Reads the first group if it has at most `room` requests.
    #[must_use]
    pub fn read(&self, room: usize) -> Read {
        let mut state = self.state.lock();
        match state.arrived.front() {
            None => return Read::Empty,
            Some(first) if first.requests.len() > room => return Read::TooLarge,
            Some(_) => {}
        }
        let Some(held) = state.arrived.pop_front() else { return Read::Empty };
        let taken = state.waiting.keys();
        let cookie = (1..).zip(taken).find(|(free, taken)| free != *taken).map(|(free, _)| free);
        let cookie = cookie.unwrap_or(state.waiting.len() as u32 + 1);
        let read = Read::Group { cookie, device: held.device, requests: Arc::clone(&held.requests) };
        state.waiting.insert(cookie, held);
        read
    }

    /// Puts a group back that could not be delivered; its cookie is free again.
    pub fn put_back(&self, cookie: u32) {
        let mut state = self.state.lock();
        if let Some(held) = state.waiting.remove(&cookie) {
            state.arrived.push_front(held);
        }
    }

    /// Answers a group. False when no group has the cookie.
    pub fn respond(&self, cookie: u32, response: Response) -> bool {
        let held = self.state.lock().waiting.remove(&cookie);
        held.is_some_and(|held| {
            (held.answer)(response);
            true
        })
    }

    /// Whether there is anything to read.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.state.lock().arrived.is_empty()
    }

    /// Who is told when something comes.
    #[must_use]
    pub const fn watchers(&self) -> &Watchers {
        &self.watchers
    }
}

impl Drop for FaultQueue {
    fn drop(&mut self) {
        let state = std::mem::take(self.state.get_mut());
        state.arrived.into_iter().chain(state.waiting.into_values()).for_each(|held| (held.answer)(Response::Invalid));
    }
}

impl fmt::Debug for FaultQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state.lock();
        let (arrived, waiting) = (state.arrived.len(), state.waiting.len());
        f.debug_struct("FaultQueue").field("arrived", &arrived).field("waiting", &waiting).finish()
    }
}

/// The way from one attachment to its fault queue.
#[derive(Debug)]
pub struct FaultRoute {
    queue: Arc<FaultQueue>,
    /// Never used twice.
    id: u64,
    /// The client's name for the device.
    device: u32,
    /// Guards that nothing is raised once it is closed.
    closed: Mutex<bool>,
}

impl FaultRoute {
    /// A route for the device that the client calls `device`.
    #[must_use]
    pub fn new(queue: &Arc<FaultQueue>, device: u32) -> Arc<Self> {
        static IDS: AtomicU64 = AtomicU64::new(0);
        let id = IDS.fetch_add(1, Ordering::Relaxed);
        Arc::new(Self { queue: Arc::clone(queue), id, device, closed: Mutex::new(false) })
    }

    /// Raises a group of requests, which `answer` ends. At once with [`Response::Invalid`] when the route is closed.
    #[doc(alias = "iommufd_fault_iopf_handler")]
    pub fn raise(&self, requests: &[PageRequest], answer: Answer) {
        if self.put(requests, answer) {
            self.queue.watchers.tell();
        }
    }

    /// Asks for one page and waits for the answer. On the thread of a device, with nothing held.
    pub(crate) fn ask(&self, request: PageRequest) -> Response {
        let gate = Arc::new(Gate::default());
        let opener = Opener(Arc::clone(&gate));
        if !self.put(&[request], Box::new(move |response| opener.open(response))) {
            return gate.wait();
        }
        let told = self.queue.watchers.tell_where_they_sleep();
        gate.look().unwrap_or_else(|| {
            told.again();
            gate.wait()
        })
    }

    /// Puts a group of requests into the queue. False when the route is closed; then it has been answered.
    fn put(&self, requests: &[PageRequest], answer: Answer) -> bool {
        let closed = self.closed.lock();
        if *closed {
            drop(closed);
            answer(Response::Invalid);
            return false;
        }
        let held = Held { route: self.id, device: self.device, requests: requests.into(), answer };
        self.queue.state.lock().arrived.push_back(held);
        true
    }

    /// Ends the route: every group of it that is still held is answered [`Response::Invalid`].
    #[doc(alias = "iommufd_auto_response_faults")]
    pub fn close(&self) {
        *self.closed.lock() = true;
        self.abort();
    }

    /// Answers every group of the route that is still held [`Response::Invalid`]: the device was reset.
    pub fn abort(&self) {
        let mine = {
            let mut state = self.queue.state.lock();
            let arrived = std::mem::take(&mut state.arrived);
            let (mut mine, others): (VecDeque<_>, _) = arrived.into_iter().partition(|held| held.route == self.id);
            state.arrived = others;
            let cookies: Vec<_> =
                state.waiting.iter().filter(|(_, held)| held.route == self.id).map(|(cookie, _)| *cookie).collect();
            mine.extend(cookies.iter().filter_map(|cookie| state.waiting.remove(cookie)));
            mine
        };
        mine.into_iter().for_each(|held| (held.answer)(Response::Invalid));
    }
}

impl Drop for FaultRoute {
    fn drop(&mut self) {
        self.close();
    }
}

/// How long a device looks for its answer before it sleeps: a client that has the page at hand answers within that, and
/// to be woken costs as much as a call.
const LOOK: Duration = Duration::from_micros(200);

/// Where one device waits for its answer.
#[derive(Default)]
struct Gate {
    answer: OnceLock<Response>,
}

/// Lets the device go on with the response, or with [`Response::Invalid`] when it ends without one.
struct Opener(Arc<Gate>);

impl Opener {
    fn open(self, response: Response) {
        let _ = self.0.answer.set(response);
    }
}

impl Drop for Opener {
    fn drop(&mut self) {
        let _ = self.0.answer.set(Response::Invalid);
    }
}

impl Gate {
    /// Looks for the answer for [`LOOK`]. Gives way to whoever wants the CPU meanwhile: that may be the client.
    fn look(&self) -> Option<Response> {
        let asked = Instant::now();
        while asked.elapsed() < LOOK {
            if let Some(answer) = self.answer.get() {
                return Some(*answer);
            }
            std::thread::yield_now();
        }
        None
    }

    fn wait(&self) -> Response {
        *self.answer.wait()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(address: u64) -> PageRequest {
        let (flags, permission) = (RequestFlags::LAST_PAGE, Permission::READ);
        PageRequest { flags, pasid: 0, group: 1, permission, address }
    }

    fn raise(route: &FaultRoute, pages: u64) -> std::sync::mpsc::Receiver<Response> {
        let (tell, told) = std::sync::mpsc::channel();
        let requests: Vec<_> = (0..pages).map(request).collect();
        route.raise(
            &requests,
            Box::new(move |response| {
                let _ = tell.send(response);
            }),
        );
        told
    }

    fn cookie(read: Read) -> u32 {
        match read {
            Read::Group { cookie, .. } => cookie,
            Read::Empty | Read::TooLarge => panic!("{read:?}"),
        }
    }

    #[test]
    fn response_ends_the_group_with_its_cookie_and_frees_the_cookie() {
        let queue = Arc::new(FaultQueue::default());
        let route = FaultRoute::new(&queue, 5);
        let (first, second) = (raise(&route, 1), raise(&route, 1));
        assert_eq!((cookie(queue.read(9)), cookie(queue.read(9))), (1, 2));
        assert!(queue.respond(1, Response::Success));
        assert!(!queue.respond(1, Response::Success), "answered once");
        assert_eq!((first.try_recv(), second.try_recv().is_err()), (Ok(Response::Success), true));
        let _third = raise(&route, 1);
        assert_eq!(cookie(queue.read(9)), 1);
    }

    #[test]
    fn group_larger_than_the_room_stays() {
        let queue = Arc::new(FaultQueue::default());
        let route = FaultRoute::new(&queue, 5);
        let _told = raise(&route, 3);
        assert_eq!(queue.read(2), Read::TooLarge);
        assert_eq!(cookie(queue.read(3)), 1);
        queue.put_back(1);
        assert!(!queue.is_empty());
    }

    #[test]
    fn route_that_closes_aborts_its_own_groups_only() {
        let queue = Arc::new(FaultQueue::default());
        let (gone, stays) = (FaultRoute::new(&queue, 1), FaultRoute::new(&queue, 2));
        let (read, unread, other) = (raise(&gone, 1), raise(&gone, 1), raise(&stays, 1));
        assert_eq!(cookie(queue.read(1)), 1);
        gone.close();
        assert_eq!((read.try_recv(), unread.try_recv()), (Ok(Response::Invalid), Ok(Response::Invalid)));
        assert!(other.try_recv().is_err());
        assert_eq!(raise(&gone, 1).try_recv(), Ok(Response::Invalid));
    }

    #[test]
    fn queue_that_goes_aborts_what_it_holds() {
        let queue = Arc::new(FaultQueue::default());
        let route = FaultRoute::new(&queue, 1);
        let told = raise(&route, 1);
        drop((route, queue));
        assert_eq!(told.try_recv(), Ok(Response::Invalid));
    }
}

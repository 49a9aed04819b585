//! Eventfds that a client signals and the server listens to: the unmask eventfd of INTx.
//!
//! One thread for the whole server, started with the first watch, waits edge-triggered: each write to an eventfd is
//! one call of its callback, and a counter that was already non-zero when the watch began is one too. The counter is
//! never read. Reading could block (the client may have read it first, and the descriptor's blocking mode is the
//! client's), and this thread serves every client. Linux does read it; docs/divergences.md says so.
//!
//! Lock order: the list of watches is a leaf. A callback is called with no lock held, and may come once more just
//! after its watch was dropped; so it looks up what it acts on, and compares tokens.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd as OwnEventFd};
use parking_lot::Mutex;

use crate::eventfd::EventFd;

/// What happens when a watched eventfd is signalled; gets the watch's token.
pub(crate) type Callback = Arc<dyn Fn(u64) + Send + Sync>;

/// The token of the eventfd that ends the thread.
const STOP: u64 = 0;

/// Listens to any number of eventfds.
#[derive(Default)]
pub(crate) struct Watcher {
    /// The thread and what it shares; `None` until the first watch.
    running: Mutex<Option<Running>>,
}

struct Running {
    shared: Arc<Shared>,
    thread: JoinHandle<()>,
}

struct Shared {
    epoll: Epoll,
    stop: OwnEventFd,
    watches: Mutex<HashMap<u64, Callback>>,
    next_token: AtomicU64,
}

/// One watched eventfd; dropping it ends the watch.
pub(crate) struct Watch {
    shared: Arc<Shared>,
    eventfd: EventFd,
    token: u64,
}

impl Watch {
    /// What the callback gets; never reused.
    pub(crate) fn token(&self) -> u64 {
        self.token
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.watches.lock().remove(&self.token);
        if let Err(error) = self.shared.epoll.delete(self.eventfd.as_fd()) {
            tracing::debug!(%error, "an eventfd was not watched");
        }
    }
}

impl Watcher {
    /// Calls `callback` for each signal of `eventfd` from now on, and once for one that is pending.
    ///
    /// # Errors
    /// The server has no descriptor, thread or watch left.
    pub(crate) fn watch(&self, eventfd: EventFd, callback: Callback) -> std::io::Result<Watch> {
        let shared = self.start()?;
        let token = shared.next_token.fetch_add(1, Ordering::Relaxed);
        shared.watches.lock().insert(token, callback);
        let event = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, token);
        if let Err(error) = shared.epoll.add(eventfd.as_fd(), event) {
            shared.watches.lock().remove(&token);
            return Err(error.into());
        }
        Ok(Watch { shared, eventfd, token })
    }

    /// The shared part, after starting the thread if there is none.
    fn start(&self) -> std::io::Result<Arc<Shared>> {
        let mut running = self.running.lock();
        if let Some(running) = &*running {
            return Ok(Arc::clone(&running.shared));
        }
        let shared = Arc::new(Shared {
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            stop: OwnEventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
            watches: Mutex::default(),
            next_token: AtomicU64::new(STOP + 1),
        });
        shared.epoll.add(shared.stop.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, STOP))?;
        let thread = ioas::thread::spawn("eventfds", {
            let shared = Arc::clone(&shared);
            move || shared.run()
        })?;
        *running = Some(Running { shared: Arc::clone(&shared), thread });
        Ok(shared)
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        let Some(Running { shared, thread }) = self.running.get_mut().take() else { return };
        if let Err(error) = shared.stop.write(1) {
            tracing::warn!(%error, "the eventfd thread cannot be stopped");
        } else if thread.thread().id() != std::thread::current().id() && thread.join().is_err() {
            tracing::error!("the eventfd thread has panicked");
        }
    }
}

impl Shared {
    fn run(&self) {
        let mut events = [EpollEvent::empty(); 16];
        loop {
            let ready = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Ok(ready) => ready,
                Err(Errno::EINTR) => continue,
                Err(error) => {
                    tracing::error!(%error, "eventfds of clients are not listened to any more");
                    return;
                }
            };
            for event in &events[..ready] {
                if event.data() == STOP {
                    return;
                }
                let callback = self.watches.lock().get(&event.data()).cloned();
                if let Some(callback) = callback {
                    callback(event.data());
                }
            }
        }
    }
}

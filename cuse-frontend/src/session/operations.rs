//! Operations: each kind of request decoded, one call made, the answer encoded.
//!
//! A body that is too short for its kind is answered EIO; the kernel never sends one. What a device node or the facade
//! has no use for (creating, renaming, extended attributes) is answered ENOSYS, which the kernel remembers.

use std::sync::Arc;

use ioas::killpoint;
use zerocopy::IntoBytes;

use super::calls::Reply;
use super::opens::{Open, Opened, Origin};
use super::ring::Rings;
use super::{Caller, Engine, Exports, Ioctl, IoctlAnswer, MAX_WRITE, Request};
use crate::files::Errno;
use crate::sys;
use crate::tree::{Entry, Found, Ownership};
use crate::wire::{self, InHeader, InitFlags, OpenFlags, SetattrValid, opcode};

/// Seconds for which the kernel may keep attributes. Names are never kept.
const ATTR_VALID: u64 = 1;

const EIO: Errno = Errno(libc::EIO);

fn decode<T: zerocopy::FromBytes + zerocopy::KnownLayout + zerocopy::Immutable>(body: &[u8]) -> Result<T, Errno> {
    wire::decode(body).map(|(value, _)| value).ok_or(EIO)
}

/// A name in a request, which ends with a NUL.
fn name(body: &[u8]) -> &[u8] {
    body.split(|byte| *byte == 0).next().unwrap_or_default()
}

impl<E: Exports> Engine<E> {
    /// Does one request and answers it.
    pub(super) fn answer(&self, request: Request<E::File>) {
        let Request { header, call, body, releasing, .. } = request;
        let _request = killpoint::on_behalf(|| wire::describe(&header, &body));
        killpoint::pass("session: a request is begun");
        let reply = self.calls.reply(call);
        match header.opcode {
            opcode::RELEASE => {
                if let Some(releasing) = releasing {
                    if let Opened::File(file) = &releasing.open.opened {
                        self.exports.closed(releasing.handle(), file);
                    }
                    if let Some(backing) = releasing.open.backing {
                        sys::fuse::backing_close(self.channel.device(), backing);
                    }
                    killpoint::pass("session: a file is about to be dropped");
                    self.files.opens.finish_release(releasing);
                }
                reply.ok(&[]);
            }
            opcode::IOCTL => self.ioctl(reply, &body),
            opcode::READ => self.read(reply, &body),
            opcode::WRITE => self.write(reply, &body),
            opcode::OPEN => self.open(reply, &header),
            opcode::INIT => self.init(reply, &body),
            opcode::FLUSH | opcode::DESTROY | opcode::RELEASEDIR => {
                reply.ok(&[]);
            }
            opcode::OPENDIR => {
                reply.ok(&[wire::OpenOut::default().as_bytes()]);
            }
            _ => match self.small(reply.call(), &header, &body) {
                Ok(answer) => {
                    reply.ok(&[&answer]);
                    if header.opcode == opcode::POLL {
                        // Who polls asks again at once, and then finds this thread awake.
                        std::thread::yield_now();
                    }
                }
                Err(error) => reply.error(error),
            },
        }
    }

    /// Requests whose answer is a few bytes that nobody needs to take back.
    fn small(&self, call: &Arc<super::Call>, header: &InHeader, body: &[u8]) -> Result<Vec<u8>, Errno> {
        match header.opcode {
            opcode::LOOKUP => {
                let (nodeid, attr) = self.place.tree()?.look_up(header.nodeid, name(body), || call.tgid())?;
                let entry = wire::EntryOut { nodeid, attr_valid: ATTR_VALID, attr, ..wire::EntryOut::default() };
                Ok(entry.as_bytes().to_vec())
            }
            opcode::GETATTR => attributes(self.place.tree()?.attr(header.nodeid)?),
            opcode::SETATTR => self.setattr(header, &decode(body)?),
            opcode::READLINK => match self.place.tree()?.what(header.nodeid)? {
                Found::Entry(Entry::Link(target)) => Ok(target.into_bytes()),
                _ => Err(Errno(libc::EINVAL)),
            },
            opcode::READDIR => self.readdir(header, &decode(body)?),
            opcode::POLL => self.poll(&decode(body)?),
            opcode::STATFS => Ok(wire::StatfsOut { bsize: 4096, frsize: 4096, namelen: 255, ..Default::default() }
                .as_bytes()
                .to_vec()),
            _ => Err(Errno(libc::ENOSYS)),
        }
    }

    fn init(&self, reply: Reply<'_>, body: &[u8]) {
        // Kernels before 5.17 send less than the whole struct.
        let mut whole = [0; size_of::<wire::InitIn>()];
        let length = body.len().min(whole.len());
        whole[..length].copy_from_slice(&body[..length]);
        let Ok(asked) = decode::<wire::InitIn>(&whole) else { return reply.error(EIO) };
        if asked.major != wire::KERNEL_VERSION || asked.minor < wire::OLDEST_MINOR_VERSION {
            tracing::error!(asked.major, asked.minor, "this kernel's FUSE is too old");
            return reply.error(Errno(libc::EPROTO));
        }
        let offered = InitFlags::from_bits_truncate(u64::from(asked.flags2) << 32 | u64::from(asked.flags));
        let mut agreed = offered & (InitFlags::PARALLEL_DIROPS | InitFlags::MAX_PAGES);
        if offered.contains(InitFlags::INIT_EXT | InitFlags::PASSTHROUGH) {
            agreed |= InitFlags::INIT_EXT | InitFlags::PASSTHROUGH;
        }
        let passthrough = agreed.contains(InitFlags::PASSTHROUGH);
        let rings = self.make_rings(offered);
        if rings.is_some() {
            agreed |= InitFlags::INIT_EXT | InitFlags::OVER_IO_URING;
        }
        let answer = wire::InitOut {
            major: wire::KERNEL_VERSION,
            minor: wire::KERNEL_MINOR_VERSION,
            max_readahead: 0,
            flags: (agreed.bits() & u64::from(u32::MAX)) as u32,
            flags2: (agreed.bits() >> 32) as u32,
            // RELEASE is a background request, and must not wait behind others.
            max_background: u16::MAX,
            congestion_threshold: u16::MAX,
            max_write: MAX_WRITE as u32,
            time_gran: 1,
            max_pages: (MAX_WRITE / 4096) as u16,
            max_stack_depth: u32::from(passthrough),
            ..wire::InitOut::default()
        };
        reply.ok(&[answer.as_bytes()]);
        if let Some(rings) = rings {
            rings.begin();
        }
        let works = passthrough && self.try_backing();
        self.exports.mappable(works);
        let _ = self.passthrough.set(works);
    }

    /// Rings, where the operator and the kernel's offer allow them. If they cannot be made, requests come by `/dev/fuse`.
    fn make_rings(&self, offered: InitFlags) -> Option<&Arc<Rings<Self>>> {
        if !self.may_use_rings || !offered.contains(InitFlags::INIT_EXT | InitFlags::OVER_IO_URING) {
            return None;
        }
        match Rings::start(Arc::clone(&self.channel), &self.me.upgrade()?, MAX_WRITE) {
            Ok(rings) => {
                self.put_in_order();
                Some(self.rings.get_or_init(|| rings))
            }
            Err(error) => {
                tracing::warn!(%error, "no io_uring: requests travel over /dev/fuse");
                None
            }
        }
    }

    /// Whether a file can be registered as another's backing: it takes privilege as well.
    fn try_backing(&self) -> bool {
        let Ok(file) = nix::sys::memfd::memfd_create(c"probe", nix::sys::memfd::MFdFlags::MFD_CLOEXEC) else {
            return false;
        };
        match sys::fuse::backing_open(self.channel.device(), std::os::fd::AsFd::as_fd(&file)) {
            Ok(id) => {
                sys::fuse::backing_close(self.channel.device(), id);
                true
            }
            Err(error) => {
                tracing::info!(%error, "regions of devices cannot be mapped by clients");
                false
            }
        }
    }

    fn open(&self, reply: Reply<'_>, header: &InHeader) {
        match self.open_node(reply.call(), header.nodeid) {
            Err(error) => reply.error(error),
            Ok((open, flags)) => {
                killpoint::pass("session: a file is open and has no handle");
                let backing_id = open.backing.unwrap_or(0);
                let handle = self.files.opens.insert(open);
                let answer = wire::OpenOut { fh: handle, open_flags: flags.bits(), backing_id };
                if !reply.ok(&[answer.as_bytes()])
                    && let Some(unwanted) = self.files.opens.begin_release(handle)
                {
                    self.files.opens.finish_release(unwanted);
                }
            }
        }
    }

    fn open_node(&self, call: &Arc<super::Call>, node: u64) -> Result<(Open<E::File>, OpenFlags), Errno> {
        let identity = self.place.identity(node);
        // The kernel lets clients in as soon as INIT is answered, a moment before we know this.
        let mappable = *self.passthrough.wait();
        let flags = OpenFlags::DIRECT_IO | OpenFlags::NOFLUSH;
        let origin = |kind: Option<_>| {
            let group = kind.and_then(|kind| self.exports.group(kind));
            Origin { kind, group, client: call.tgid() }
        };
        let (file, origin) = match self.place.what(node)? {
            Found::Entry(Entry::Text(make)) => {
                let open = Open { node: identity, opened: Opened::Text(make()), backing: None, origin: origin(None) };
                return Ok((open, flags));
            }
            Found::Entry(Entry::Node(kind)) => {
                let origin = origin(Some(kind));
                self.files.opens.wait_for_releases(Some(origin));
                let caller = Caller { call, files: &self.files };
                (self.exports.open(kind, &caller)?, origin)
            }
            Found::Offered(offered) if offered.recipient.opener != call.tgid() => return Err(Errno(libc::EACCES)),
            Found::Offered(offered) => {
                let file = offered.take().ok_or(Errno(libc::ESTALE))?;
                let group = self.exports.group_of(&file);
                (file, Origin { kind: None, group, client: offered.recipient.client })
            }
            Found::Entry(_) => return Err(Errno(libc::EISDIR)),
        };
        let backing = if mappable { self.back(&file) } else { None };
        let mut backed = if backing.is_some() { OpenFlags::PASSTHROUGH } else { OpenFlags::empty() };
        backed.set(OpenFlags::STREAM, self.exports.is_stream(&file));
        let open = Open { node: identity, opened: Opened::File(file), backing, origin };
        Ok((open, flags | OpenFlags::PARALLEL_DIRECT_WRITES | backed))
    }

    /// Registers the file that mmaps of an open file map.
    fn back(&self, file: &E::File) -> Option<i32> {
        let memory = self.exports.mapping(file)?;
        sys::fuse::backing_open(self.channel.device(), memory)
            .inspect_err(|error| tracing::warn!(%error, "a device's regions cannot be mapped"))
            .ok()
    }

    fn setattr(&self, header: &InHeader, change: &wire::SetattrIn) -> Result<Vec<u8>, Errno> {
        let valid = SetattrValid::from_bits_retain(change.valid);
        let of = |flag, value| valid.contains(flag).then_some(value);
        let ownership = Ownership {
            mode: of(SetattrValid::MODE, change.mode),
            uid: of(SetattrValid::UID, change.uid),
            gid: of(SetattrValid::GID, change.gid),
        };
        // A length is taken and ignored, as a device node does: open(O_TRUNC) sets it.
        attributes(self.place.tree()?.set_ownership(header.nodeid, ownership)?)
    }

    fn readdir(&self, header: &InHeader, read: &wire::ReadIn) -> Result<Vec<u8>, Errno> {
        let mut answer = Vec::new();
        let names = self.place.tree()?.list(header.nodeid)?;
        let dots = [(".".to_owned(), u32::from(libc::DT_DIR)), ("..".to_owned(), u32::from(libc::DT_DIR))];
        let start = usize::try_from(read.offset).map_err(|_| EIO)?;
        for (index, (name, kind)) in dots.into_iter().chain(names).enumerate().skip(start) {
            let size = wire::dirent_size(name.len());
            if answer.len() + size > read.size as usize {
                break;
            }
            let end = answer.len() + size;
            let head = wire::DirentHead {
                // Not known before a lookup; any number but 0 will do.
                ino: u64::from(u32::MAX),
                off: index as u64 + 1,
                namelen: name.len() as u32,
                type_: kind,
            };
            answer.extend_from_slice(head.as_bytes());
            answer.extend_from_slice(name.as_bytes());
            answer.resize(end, 0);
        }
        Ok(answer)
    }

    /// The open file of a handle.
    fn file(&self, handle: u64) -> Result<Arc<Open<E::File>>, Errno> {
        self.files.opens.get(handle).ok_or(Errno(libc::EBADF))
    }

    fn ioctl(&self, reply: Reply<'_>, body: &[u8]) {
        let result = wire::decode::<wire::IoctlIn>(body).ok_or(EIO).and_then(|(ioctl, data)| {
            let open = self.file(ioctl.fh)?;
            let Opened::File(file) = &open.opened else { return Err(Errno(libc::ENOTTY)) };
            let caller = Caller { call: reply.call(), files: &self.files };
            let ioctl = Ioctl {
                handle: ioctl.fh,
                cmd: ioctl.cmd,
                arg: ioctl.arg,
                compat: ioctl.flags & wire::IOCTL_COMPAT != 0,
                brought: data.get(..ioctl.in_size as usize).ok_or(EIO)?,
                room: ioctl.out_size,
            };
            self.exports.ioctl(file, &caller, &ioctl)
        });
        match result {
            Ok(answer) => answer_ioctl(reply, &answer),
            Err(error) => reply.error(error),
        }
    }

    fn read(&self, reply: Reply<'_>, body: &[u8]) {
        let mut data = Vec::new();
        let result = decode::<wire::ReadIn>(body).and_then(|read| {
            let open = self.file(read.fh)?;
            match &open.opened {
                Opened::Text(text) => {
                    let start = usize::try_from(read.offset).unwrap_or(usize::MAX).min(text.len());
                    let end = start.saturating_add(read.size as usize).min(text.len());
                    data.extend_from_slice(&text[start..end]);
                    Ok(end - start)
                }
                Opened::File(file) => {
                    data.resize((read.size as usize).min(MAX_WRITE), 0);
                    let caller = Caller { call: reply.call(), files: &self.files };
                    self.exports.read(file, &caller, read.offset, &mut data)
                }
            }
        });
        match result {
            Ok(length) => {
                reply.ok(&[data.get(..length).unwrap_or_default()]);
            }
            Err(error) => reply.error(error),
        }
    }

    fn write(&self, reply: Reply<'_>, body: &[u8]) {
        let result = wire::decode::<wire::WriteIn>(body).ok_or(EIO).and_then(|(write, data)| {
            let open = self.file(write.fh)?;
            let Opened::File(file) = &open.opened else { return Err(Errno(libc::EBADF)) };
            let data = data.get(..write.size as usize).ok_or(EIO)?;
            let caller = Caller { call: reply.call(), files: &self.files };
            self.exports.write(file, &caller, write.offset, data)
        });
        match result {
            Ok(size) => {
                let size = u32::try_from(size).unwrap_or(u32::MAX);
                reply.ok(&[wire::WriteOut { size, padding: 0 }.as_bytes()]);
            }
            Err(error) => reply.error(error),
        }
    }

    fn poll(&self, poll: &wire::PollIn) -> Result<Vec<u8>, Errno> {
        let open = self.file(poll.fh)?;
        let revents = match &open.opened {
            Opened::File(file) => {
                let waits = poll.flags & wire::POLL_SCHEDULE_NOTIFY != 0;
                if waits {
                    // Before the look, so that nothing comes between.
                    let (channel, kh) = (Arc::clone(&self.channel), poll.kh);
                    self.exports.watch(file, kh, Arc::new(move || channel.notify_poll(kh)));
                }
                let revents = self.exports.poll(file);
                if waits && revents & poll.events == 0 {
                    self.exports.sleeps(file);
                }
                revents
            }
            Opened::Text(_) => u32::from((libc::POLLIN | libc::POLLRDNORM).cast_unsigned()),
        };
        Ok(wire::PollOut { revents: revents & poll.events, padding: 0 }.as_bytes().to_vec())
    }
}

fn answer_ioctl(reply: Reply<'_>, answer: &IoctlAnswer) {
    let (data, out): (&[&[u8]], _) = match answer {
        IoctlAnswer::Value(result) => (&[], wire::IoctlOut { result: *result, ..wire::IoctlOut::default() }),
        IoctlAnswer::Data(result, data) => (&[data], wire::IoctlOut { result: *result, ..wire::IoctlOut::default() }),
        IoctlAnswer::Again(read, write) => {
            let (in_iovs, out_iovs) = (read.len() as u32, write.len() as u32);
            let out = wire::IoctlOut { result: 0, flags: wire::IOCTL_RETRY, in_iovs, out_iovs };
            (&[read.as_bytes(), write.as_bytes()], out)
        }
    };
    let mut parts = vec![out.as_bytes()];
    parts.extend(data);
    reply.ok(&parts);
}

fn attributes(attr: wire::Attr) -> Result<Vec<u8>, Errno> {
    Ok(wire::AttrOut { attr_valid: ATTR_VALID, attr, ..wire::AttrOut::default() }.as_bytes().to_vec())
}

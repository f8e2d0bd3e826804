//! A proxy between two daemons that counts, cuts, spoils, or does something at a byte of what the source sends.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

/// What happens to one connection's bytes from the source.
pub enum Plan {
    /// Nothing.
    Pass,
    /// The connection breaks after so many.
    CutAfter(u64),
    /// One bit of this byte is another.
    FlipAt(u64),
    /// Nothing more comes after so many, and the connection stays open.
    HangAfter(u64),
    /// This is called when so many have come; the rest is read and thrown away.
    CallAt(u64, Box<dyn FnOnce() + Send>),
}

/// What was carried on one connection.
#[derive(Debug, Clone, Default)]
pub struct Carried {
    /// To the source, in full.
    pub asked: Vec<u8>,
    /// Bytes from the source, whether or not they were passed on.
    pub sent: u64,
}

impl Carried {
    /// What was asked, without what took it back: whether the asker's last words left it before its end
    /// is chance, and with them a source may owe no answer any more (RFC 9113: preface 3.4, frame 4.1,
    /// RST_STREAM 6.4, GOAWAY 6.8).
    pub fn request(&self) -> Vec<u8> {
        const PREFACE: usize = 24;
        const HEAD: usize = 9;
        const TAKEN_BACK: [u8; 2] = [3, 7];
        let (preface, mut frames) = self.asked.split_at(PREFACE);
        let mut request = preface.to_vec();
        while let [a, b, c, kind, ..] = *frames {
            let payload = u32::from_be_bytes([0, a, b, c]) as usize;
            let (frame, rest) = frames.split_at(frames.len().min(HEAD + payload));
            if !TAKEN_BACK.contains(&kind) {
                request.extend_from_slice(frame);
            }
            frames = rest;
        }
        request
    }
}

/// See the module.
pub struct Proxy {
    pub address: SocketAddr,
    connections: Arc<Mutex<Vec<Carried>>>,
}

impl Proxy {
    /// `plan` says what happens to the next connection, after so many and so many bytes from the source.
    pub fn start(
        source: SocketAddr,
        mut plan: impl FnMut(usize, u64) -> Plan + Send + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("its address");
        let connections: Arc<Mutex<Vec<Carried>>> = Arc::default();
        let all = connections.clone();
        std::thread::spawn(move || {
            for (number, client) in listener.incoming().flatten().enumerate() {
                let total = {
                    let mut all = all.lock().expect("no panic");
                    all.push(Carried::default());
                    all.iter().map(|carried| carried.sent).sum()
                };
                let Ok(server) = TcpStream::connect(source) else {
                    let _ = client.shutdown(Shutdown::Both); // The source is down.
                    continue;
                };
                let plan = plan(number, total);
                let (from, to) =
                    (client.try_clone().expect("a socket"), server.try_clone().expect("a socket"));
                let (asked, sent) = (all.clone(), all.clone());
                std::thread::spawn(move || {
                    carry(from, to, |bytes| {
                        asked.lock().expect("no panic")[number].asked.extend_from_slice(bytes);
                    });
                });
                std::thread::spawn(move || {
                    answer(server, client, plan, |bytes| {
                        sent.lock().expect("no panic")[number].sent += bytes;
                    });
                });
            }
        });
        Self { address, connections }
    }

    pub fn carried(&self) -> Vec<Carried> {
        self.connections.lock().expect("no panic").clone()
    }
}

fn carry(mut from: TcpStream, mut to: TcpStream, mut see: impl FnMut(&[u8])) {
    let mut buffer = [0; 16 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        see(&buffer[..count]);
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write); // Gone already is as good.
}

fn answer(mut from: TcpStream, mut to: TcpStream, plan: Plan, mut see: impl FnMut(u64)) {
    let mut buffer = [0; 4 << 10];
    let mut passed = 0;
    let mut plan = Some(plan);
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        see(count as u64);
        let mut bytes = &mut buffer[..count];
        let until = |at: u64| usize::try_from(at.saturating_sub(passed)).unwrap_or(usize::MAX);
        match &plan {
            None => continue,
            Some(Plan::Pass) => {}
            Some(Plan::FlipAt(at)) => {
                if let Some(byte) = at.checked_sub(passed).and_then(|at| bytes.get_mut(at as usize))
                {
                    *byte ^= 1;
                }
            }
            Some(Plan::CutAfter(at) | Plan::HangAfter(at) | Plan::CallAt(at, _)) => {
                if until(*at) <= count {
                    bytes = &mut bytes[..until(*at)];
                    let _ = to.write_all(bytes);
                    match plan.take() {
                        Some(Plan::CutAfter(_)) => break,
                        Some(Plan::CallAt(_, call)) => call(),
                        _ => {}
                    }
                    continue;
                }
            }
        }
        passed += count as u64;
        if to.write_all(bytes).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

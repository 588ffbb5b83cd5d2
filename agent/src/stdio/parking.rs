//! Raw streams that came before their process was made.

use std::collections::HashMap;

use guest_protocol::Stream;
use guest_protocol::stdio::{Channel, Header};

/// Streams that can be parked; one more is refused. Three for each of more execs than anybody starts
/// at once.
const MAX_STREAMS: usize = 8192;

/// Streams by the channel they are for.
#[derive(Debug)]
pub struct Parking {
    /// With their tickets.
    streams: HashMap<Header, (u64, Stream)>,
    last_ticket: u64,
    most: usize,
}

impl Default for Parking {
    fn default() -> Parking {
        Parking {
            streams: HashMap::new(),
            last_ticket: 0,
            most: MAX_STREAMS,
        }
    }
}

impl Parking {
    /// Whether a stream may be parked. Whoever is told so parks it, after a moment in which others
    /// may: there can be a few more than the limit.
    pub fn has_room(&self, header: &Header) -> bool {
        self.streams.len() < self.most || self.streams.contains_key(header)
    }

    /// Keeps a stream until it is claimed; a second one for the same channel replaces the first.
    /// The ticket is for [`Parking::expire`].
    pub fn park(&mut self, header: Header, stream: Stream) -> u64 {
        self.last_ticket += 1;
        self.streams.insert(header, (self.last_ticket, stream));
        self.last_ticket
    }

    /// Drops a stream that nobody claimed in time.
    pub fn expire(&mut self, header: &Header, ticket: u64) {
        if self
            .streams
            .get(header)
            .is_some_and(|(held, _)| *held == ticket)
        {
            self.streams.remove(header);
        }
    }

    /// Takes the streams of one process: of an exec, or of the first one.
    pub fn claim(&mut self, container_id: &str, exec_id: Option<&str>) -> Claimed {
        let mut take = |channel| {
            let header = Header {
                channel,
                container_id: container_id.into(),
                // The header's form of "the first process" is an empty id.
                exec_id: exec_id.unwrap_or_default().into(),
            };
            self.streams.remove(&header).map(|(_, stream)| stream)
        };
        Claimed([
            take(Channel::Stdin),
            take(Channel::Stdout),
            take(Channel::Stderr),
        ])
    }

    /// Drops all streams of a container that is removed.
    pub fn forget(&mut self, container_id: &str) {
        self.streams
            .retain(|header, _| header.container_id != container_id);
    }
}

/// The raw streams of one process, each of which may be missing.
#[derive(Debug, Default)]
pub struct Claimed([Option<Stream>; 3]);

const ORDER: [Channel; 3] = [Channel::Stdin, Channel::Stdout, Channel::Stderr];

impl Claimed {
    /// True if there is at least one.
    pub fn any(&self) -> bool {
        self.0.iter().any(Option::is_some)
    }

    /// The stream of a channel.
    pub fn get(&self, channel: Channel) -> Option<&Stream> {
        ORDER
            .iter()
            .zip(&self.0)
            .find(|(one, _)| **one == channel)
            .and_then(|(_, stream)| stream.as_ref())
    }
}

impl IntoIterator for Claimed {
    type Item = (Channel, Stream);
    type IntoIter = std::vec::IntoIter<Self::Item>;

    fn into_iter(self) -> Self::IntoIter {
        let pairs: Vec<_> = ORDER
            .into_iter()
            .zip(self.0)
            .filter_map(|(channel, stream)| Some((channel, stream?)))
            .collect();
        pairs.into_iter()
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixStream;

    use super::*;

    fn header(channel: Channel, container_id: &str) -> Header {
        Header {
            channel,
            container_id: container_id.into(),
            exec_id: String::new(),
        }
    }

    fn stream() -> Stream {
        Stream::Unix(UnixStream::pair().unwrap().0)
    }

    #[tokio::test]
    async fn a_process_gets_its_own_streams_and_only_once() {
        let mut parking = Parking::default();
        parking.park(header(Channel::Stdout, "a"), stream());
        parking.park(header(Channel::Stdin, "b"), stream());
        let claimed = parking.claim("a", None);
        assert!(
            claimed.any()
                && claimed.get(Channel::Stdout).is_some()
                && claimed.get(Channel::Stdin).is_none()
        );
        assert_eq!(claimed.into_iter().count(), 1);
        assert!(!parking.claim("a", None).any());
        parking.forget("b");
        assert!(!parking.claim("b", None).any());
    }

    #[tokio::test]
    async fn an_old_ticket_does_not_drop_a_new_stream() {
        let mut parking = Parking::default();
        let old = parking.park(header(Channel::Stdout, "a"), stream());
        let new = parking.park(header(Channel::Stdout, "a"), stream());
        parking.expire(&header(Channel::Stdout, "a"), old);
        assert!(parking.streams.len() == 1);
        parking.expire(&header(Channel::Stdout, "a"), new);
        assert!(parking.streams.is_empty());
    }

    #[tokio::test]
    async fn a_flood_of_streams_is_refused() {
        let mut parking = Parking {
            most: 3,
            ..Parking::default()
        };
        let header = |id| header(Channel::Stdout, id);
        for id in ["a", "b", "c"] {
            assert!(parking.has_room(&header(id)));
            parking.park(header(id), stream());
        }
        assert!(!parking.has_room(&header("more")));
        assert!(parking.has_room(&header("b")), "in the place of another");
    }
}

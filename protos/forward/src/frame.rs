//! Frames out of a stream of bytes, however they were cut on their way; pure.

/// Bytes before each frame's payload.
const HEADER: usize = 2;
/// The longest payload, bytes.
const MAX_PAYLOAD: usize = u16::MAX as usize;

/// A buffer in which a frame is made where its payload is read into.
#[derive(Debug)]
pub struct Outgoing(Vec<u8>);

impl Outgoing {
    /// With room for so many bytes of payload.
    pub fn new(room: usize) -> Self {
        let mut outgoing = Self(Vec::new());
        outgoing.set_room(room);
        outgoing
    }

    /// Makes room for so many bytes of payload; not more than a frame can have.
    pub fn set_room(&mut self, room: usize) {
        self.0.resize(room.min(MAX_PAYLOAD).saturating_add(HEADER), 0);
    }

    /// The room for the payload.
    pub fn room(&mut self) -> &mut [u8] {
        self.0.get_mut(HEADER..).unwrap_or_default()
    }

    /// The frame whose payload are the first `length` bytes of the room; of none it is the end of the direction.
    pub fn frame(&mut self, length: usize) -> &[u8] {
        let length = length.min(self.room().len());
        // The room is at most as long as the greatest number.
        let header = (length as u16).to_le_bytes();
        self.0.iter_mut().zip(header).for_each(|(place, byte)| *place = byte);
        self.0.get(..length.saturating_add(HEADER)).unwrap_or_default()
    }
}

/// Something came after the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("bytes after the end of a direction")]
pub struct AfterEnd;

/// What the next bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    /// Bytes of the connection.
    Payload(&'a [u8]),
    /// The sender has finished.
    End,
}

/// The reading side of one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frames {
    /// Before a frame.
    Between,
    /// The header's first byte has come.
    HalfHeader(u8),
    /// So many bytes of the payload are still to come; not 0.
    Inside(usize),
    /// The end has come.
    Ended,
}

impl Frames {
    /// Takes the first piece from `bytes`, which moves on behind it. None when `bytes` is used up.
    ///
    /// # Errors
    /// If there is something after the end.
    pub fn next<'a>(&mut self, bytes: &mut &'a [u8]) -> Result<Option<Piece<'a>>, AfterEnd> {
        while let Some((first, rest)) = bytes.split_first() {
            match *self {
                Self::Between => {
                    *self = Self::HalfHeader(*first);
                    *bytes = rest;
                }
                Self::HalfHeader(low) => {
                    *bytes = rest;
                    let length = usize::from(u16::from_le_bytes([low, *first]));
                    if length == 0 {
                        *self = Self::Ended;
                        return Ok(Some(Piece::End));
                    }
                    *self = Self::Inside(length);
                }
                Self::Inside(left) => {
                    let (payload, rest) = bytes.split_at(left.min(bytes.len()));
                    *bytes = rest;
                    *self = match left.saturating_sub(payload.len()) {
                        0 => Self::Between,
                        left => Self::Inside(left),
                    };
                    return Ok(Some(Piece::Payload(payload)));
                }
                Self::Ended => return Err(AfterEnd),
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Payload, whether the end came, and whether something came after it.
    fn read(stream: &[u8], cuts: &[usize]) -> (Vec<u8>, bool, bool) {
        let (mut frames, mut payload, mut ended) = (Frames::Between, Vec::new(), false);
        let mut rest = stream;
        let mut cuts = cuts.iter().copied().chain(std::iter::repeat(usize::MAX));
        while !rest.is_empty() {
            let (mut now, later) = rest.split_at(cuts.next().unwrap().clamp(1, rest.len()));
            rest = later;
            loop {
                match frames.next(&mut now) {
                    Ok(Some(Piece::Payload(bytes))) => payload.extend_from_slice(bytes),
                    Ok(Some(Piece::End)) => ended = true,
                    Ok(None) => break,
                    Err(AfterEnd) => return (payload, ended, true),
                }
            }
        }
        (payload, ended, false)
    }

    proptest! {
        #[test]
        fn frames_are_read_as_they_were_written_however_they_are_cut(
            payloads in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..600), 0..8),
            cuts in proptest::collection::vec(1..700usize, 0..40),
            end: bool,
            after in proptest::collection::vec(any::<u8>(), 0..3),
        ) {
            let mut stream = Vec::new();
            let mut outgoing = Outgoing::new(600);
            for payload in &payloads {
                outgoing.room()[..payload.len()].copy_from_slice(payload);
                stream.extend(outgoing.frame(payload.len()));
            }
            if end {
                stream.extend(outgoing.frame(0));
                stream.extend(&after);
            }
            let expected = (payloads.concat(), end, end && !after.is_empty());
            prop_assert_eq!(read(&stream, &cuts), expected);
        }

        #[test]
        fn any_bytes_are_read_without_harm(stream in proptest::collection::vec(any::<u8>(), 0..2000), cut in 1..100usize) {
            let (payload, ..) = read(&stream, &vec![cut; stream.len()]);
            prop_assert!(payload.len() <= stream.len());
        }
    }

    #[test]
    fn a_frame_holds_no_more_than_its_length_can_say() {
        let mut outgoing = Outgoing::new(MAX_PAYLOAD + 1);
        assert_eq!(outgoing.room().len(), MAX_PAYLOAD);
        let frame = outgoing.frame(MAX_PAYLOAD + 1).to_vec();
        assert_eq!(read(&frame, &[]), (vec![0; MAX_PAYLOAD], false, false));
    }
}

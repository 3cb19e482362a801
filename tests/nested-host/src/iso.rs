//! A CD that boots Linux, as bytes: an ISO 9660 image with ISOLINUX as its El Torito boot image. Bochs can load a kernel
//! from a disk only, and a CD made here needs no file on this machine and no other program.
//!
//! ```text
//!   sector   0  15  16        17           18    19   20      21         22            23 …
//!            unused │ volume  │ boot record │ end │ path tables │ directory │ boot catalog │ files
//! ```
//!
//! ECMA-119 is the file system, "El Torito" Bootable CD-ROM Format Specification 1.0 the boot record and its catalog.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};

use anyhow::{Context, ensure};

/// Bytes of a sector.
const SECTOR: usize = 2048;
const VOLUME: u32 = 16;
const PATH_TABLES: [u32; 2] = [19, 20];
const DIRECTORY: u32 = 21;
const CATALOG: u32 = 22;
const FILES: u32 = 23;
/// Length of the only directory's record in a path table.
const PATH_TABLE_LENGTH: u32 = 10;

/// What lies on the CD, in its root directory.
pub struct Entry<'a> {
    /// Its name by ISO 9660's rules: upper case, at most 8.3.
    pub name: &'a str,
    /// Its content; read from its beginning.
    pub content: Content<'a>,
}

/// Bytes in memory or in a file.
pub enum Content<'a> {
    /// In memory.
    Bytes(&'a [u8]),
    /// In a file, which may be large.
    File(&'a File),
}

impl Content<'_> {
    fn length(&self) -> anyhow::Result<u32> {
        let length = match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::File(file) => file.metadata()?.len(),
        };
        u32::try_from(length).context("more than 4 GiB")
    }
}

/// Writes the image. `boot` is isolinux.bin.
pub fn write(out: &mut (impl Write + Seek), boot: &[u8], entries: &[Entry<'_>]) -> anyhow::Result<()> {
    let boot = with_boot_information(boot, FILES)?;
    let mut at = FILES + sectors(u32::try_from(boot.len())?);
    let mut directory = Vec::new();
    record(&mut directory, &[0], DIRECTORY, SECTOR as u32, true);
    record(&mut directory, &[1], DIRECTORY, SECTOR as u32, true);
    let mut files = Vec::new();
    for entry in entries {
        let length = entry.content.length().with_context(|| entry.name.to_owned())?;
        record(&mut directory, format!("{};1", entry.name).as_bytes(), at, length, false);
        files.push((at, &entry.content));
        at = at.checked_add(sectors(length)).context("the CD is larger than 8 TiB")?;
    }
    ensure!(directory.len() <= SECTOR, "more files than one sector of directory can list");

    for (sector, bytes) in [
        (VOLUME, volume(at)),
        (VOLUME + 1, boot_record()),
        (VOLUME + 2, b"\xffCD001\x01".to_vec()),
        (PATH_TABLES[0], path_table(DIRECTORY.to_le_bytes(), 1u16.to_le_bytes())),
        (PATH_TABLES[1], path_table(DIRECTORY.to_be_bytes(), 1u16.to_be_bytes())),
        (DIRECTORY, directory),
        (CATALOG, catalog(FILES)),
        (FILES, boot),
    ] {
        seek(out, sector)?;
        out.write_all(&bytes)?;
    }
    for (sector, content) in files {
        seek(out, sector)?;
        match *content {
            Content::Bytes(bytes) => out.write_all(bytes)?,
            Content::File(mut file) => {
                file.rewind()?;
                io::copy(&mut file.take(u64::from(u32::MAX)), out)?;
            }
        }
    }
    // The last sector is whole.
    let end = u64::from(at) * SECTOR as u64;
    out.seek(SeekFrom::Start(end - 1))?;
    out.write_all(&[0])?;
    Ok(())
}

fn seek(out: &mut impl Seek, sector: u32) -> io::Result<u64> {
    out.seek(SeekFrom::Start(u64::from(sector) * SECTOR as u64))
}

fn sectors(length: u32) -> u32 {
    length.div_ceil(SECTOR as u32)
}

/// A number in both byte orders, little-endian first (ECMA-119, 7.3.3).
fn both(number: u32) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&number.to_le_bytes());
    bytes[4..].copy_from_slice(&number.to_be_bytes());
    bytes
}

/// A 16-bit number in both byte orders (ECMA-119, 7.2.3).
fn both16(number: u16) -> [u8; 4] {
    let (little, big) = (number.to_le_bytes(), number.to_be_bytes());
    [little[0], little[1], big[0], big[1]]
}

/// A directory record (ECMA-119, 9.1). Its date is 1 January 2000, so that the same content makes the same CD.
fn record(out: &mut Vec<u8>, name: &[u8], sector: u32, length: u32, directory: bool) {
    let start = out.len();
    let size = (33 + name.len()).next_multiple_of(2);
    out.extend([size as u8, 0]);
    out.extend(both(sector));
    out.extend(both(length));
    out.extend([100, 1, 1, 0, 0, 0, 0]);
    out.extend([if directory { 2 } else { 0 }, 0, 0]);
    out.extend(both16(1));
    out.push(name.len() as u8);
    out.extend(name);
    out.resize(start + size, 0);
}

/// The primary volume descriptor (ECMA-119, 8.4).
fn volume(sectors: u32) -> Vec<u8> {
    let mut out = b"\x01CD001\x01\0".to_vec();
    out.extend([b' '; 32]);
    out.extend(format!("{:32}", "NESTED_HOST").bytes());
    out.extend([0; 8]);
    out.extend(both(sectors));
    out.extend([0; 32]);
    out.extend(both16(1));
    out.extend(both16(1));
    out.extend(both16(SECTOR as u16));
    out.extend(both(PATH_TABLE_LENGTH));
    out.extend(PATH_TABLES[0].to_le_bytes());
    out.extend([0; 4]);
    out.extend(PATH_TABLES[1].to_be_bytes());
    out.extend([0; 4]);
    record(&mut out, &[0], DIRECTORY, SECTOR as u32, true);
    // Identifiers of set, publisher, preparer and application, then of three files: none.
    out.extend([b' '; 4 * 128 + 3 * 37]);
    for _ in 0..4 {
        out.extend(b"0000000000000000\0");
    }
    out.push(1);
    out.resize(SECTOR, 0);
    out
}

/// The root directory's record in a path table (ECMA-119, 9.4).
fn path_table(sector: [u8; 4], parent: [u8; 2]) -> Vec<u8> {
    [&[1, 0][..], &sector, &parent, &[0, 0]].concat()
}

/// The boot record volume descriptor (El Torito, 2.0).
fn boot_record() -> Vec<u8> {
    let mut out = b"\0CD001\x01EL TORITO SPECIFICATION".to_vec();
    out.resize(0x47, 0);
    out.extend(CATALOG.to_le_bytes());
    out
}

/// The boot catalog: a validation entry, whose words add up to 0, and an entry without emulation that loads four
/// 512-byte sectors at the usual place (El Torito, 2.1 and 2.2).
fn catalog(sector: u32) -> Vec<u8> {
    let mut validation = [0u8; 32];
    validation[0] = 1;
    (validation[30], validation[31]) = (0x55, 0xaa);
    let sum =
        validation.chunks_exact(2).fold(0u16, |sum, pair| sum.wrapping_add(u16::from_le_bytes([pair[0], pair[1]])));
    validation[28..30].copy_from_slice(&sum.wrapping_neg().to_le_bytes());
    let mut entry = [0u8; 32];
    entry[0] = 0x88;
    entry[6] = 4;
    entry[8..12].copy_from_slice(&sector.to_le_bytes());
    [validation, entry].concat()
}

/// ISOLINUX finds itself on the CD by a table at its offset 8: sectors of the volume descriptor and of itself, its length
/// and the sum of its words from offset 64 on (mkisofs(8), -boot-info-table).
fn with_boot_information(boot: &[u8], sector: u32) -> anyhow::Result<Vec<u8>> {
    let mut image = boot.to_vec();
    ensure!(image.len() > 64, "isolinux.bin has only {} bytes", image.len());
    let sum = image[64..].chunks(4).fold(0u32, |sum, chunk| {
        let mut word = [0; 4];
        word[..chunk.len()].copy_from_slice(chunk);
        sum.wrapping_add(u32::from_le_bytes(word))
    });
    let length = u32::try_from(image.len())?;
    for (n, value) in [VOLUME, sector, length, sum].iter().enumerate() {
        image[8 + 4 * n..12 + 4 * n].copy_from_slice(&value.to_le_bytes());
    }
    image[24..64].fill(0);
    Ok(image)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> Vec<u8> {
        let mut out = io::Cursor::new(Vec::new());
        let mut large = tempfile::tempfile().unwrap();
        large.write_all(&vec![7; 5000]).unwrap();
        let entries = [
            Entry { name: "HELLO.TXT", content: Content::Bytes(b"hello") },
            Entry { name: "LARGE", content: Content::File(&large) },
        ];
        write(&mut out, &vec![1; 3000], &entries).unwrap();
        out.into_inner()
    }

    fn number(image: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(image[at..at + 4].try_into().unwrap())
    }

    /// Follows the descriptors as a reader does: volume, root directory, record by record.
    #[test]
    fn files_are_found_through_the_volume_descriptor() {
        let image = image();
        let volume = &image[16 * SECTOR..][..SECTOR];
        assert_eq!(&volume[1..6], b"CD001");
        assert_eq!(number(volume, 80) as usize * SECTOR, image.len());
        let mut record = &image[number(volume, 156 + 2) as usize * SECTOR..];
        let mut found = Vec::new();
        while record[0] != 0 {
            let name = &record[33..33 + record[32] as usize];
            let (at, length) = (number(record, 2) as usize * SECTOR, number(record, 10) as usize);
            found.push((name.to_vec(), at, length));
            record = &record[record[0] as usize..];
        }
        let names: Vec<_> = found.iter().map(|(name, ..)| name.as_slice()).collect();
        assert_eq!(names, [&b"\0"[..], b"\x01", b"HELLO.TXT;1", b"LARGE;1"]);
        let content = |n: usize| &image[found[n].1..][..found[n].2];
        assert_eq!(content(2), b"hello");
        assert_eq!(content(3), [7; 5000]);
    }

    #[test]
    fn the_boot_catalog_leads_to_the_boot_image() {
        let image = image();
        let catalog = &image[number(&image, 17 * SECTOR + 0x47) as usize * SECTOR..];
        let sum =
            catalog[..32].chunks(2).fold(0u16, |sum, pair| sum.wrapping_add(u16::from_le_bytes([pair[0], pair[1]])));
        assert_eq!(sum, 0);
        let sector = number(catalog, 32 + 8);
        let boot = &image[sector as usize * SECTOR..];
        assert_eq!((number(boot, 8), number(boot, 12), number(boot, 16)), (16, sector, 3000));
        assert_eq!(number(boot, 20), 0x0101_0101u32.wrapping_mul((3000 - 64) / 4));
    }

    #[test]
    fn a_boot_image_that_is_too_short_is_refused() {
        assert!(write(&mut io::Cursor::new(Vec::new()), &[0; 64], &[]).is_err());
    }
}

//! The guest's command line: options `key=value`, separated by spaces. Unknown options are ignored,
//! because a boot loader or VMM may add some.

/// Options of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// `ip=10.77.0.5/24`: address and prefix length of the first NIC.
    pub ip: Option<([u8; 4], u8)>,
    /// `alias=10.77.0.9`: a second address of the first NIC, as a virtual IP is; `alias=none` for none.
    pub alias: Option<[u8; 4]>,
    /// `gw=10.77.0.1`: default route.
    pub gateway: Option<[u8; 4]>,
    /// `dirty=256M`: how much memory to rewrite over and over, verifying each page before.
    pub dirty_bytes: u64,
    /// `rate=64M`: at most so much of it per second; without it, as fast as it can.
    pub dirty_rate_bytes: Option<u64>,
    /// `fill=1G`: how much memory to fill once and then verify continuously.
    pub fill_bytes: u64,
    /// `tick_ms=10`: the period of the tick on the serial console; 0 for none.
    pub tick_ms: u64,
    /// `disk=0`: do not touch the disk. It is checked when there is one.
    pub disk: bool,
    /// `disk_ms=5`: pause between two blocks written.
    pub disk_ms: u64,
    /// `disk_slots=1024`: over how many blocks the ring goes.
    pub disk_slots: u64,
    /// `tsc_khz=2800000`: the frequency of the time-stamp counter; measured without it.
    pub tsc_khz: Option<u64>,
    /// `ecam=0xe0000000`: PCI configuration space in memory; ports 0xCF8/0xCFC without it.
    pub ecam: Option<u64>,
    /// `button=0x603`: the power button is bit 0 of this port, and reading it clears it. Without it
    /// the guest looks at the PM1 event block, if the machine has one.
    pub button: Option<u16>,
    /// `agent=0`: no agent, also where there is a port for one.
    pub agent: bool,
    /// `outs=0`: write the console byte by byte instead of by string I/O.
    pub string_io: bool,
    /// `hostile=7`: attack the machine's devices, with this seed, instead of all else.
    pub hostile: Option<u64>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            ip: None,
            alias: None,
            gateway: None,
            dirty_bytes: 0,
            dirty_rate_bytes: None,
            fill_bytes: 0,
            tick_ms: 10,
            disk: true,
            disk_ms: 5,
            disk_slots: 1024,
            tsc_khz: None,
            ecam: None,
            button: None,
            agent: true,
            string_io: true,
            hostile: None,
        }
    }
}

impl Options {
    /// Reads a command line.
    ///
    /// # Errors
    /// The first option with a known key and an invalid value.
    pub fn parse(line: &str) -> Result<Self, &str> {
        let mut options = Self::default();
        for word in line.split_ascii_whitespace() {
            if let Some((key, value)) = word.split_once('=') {
                options.set(key, value).ok_or(word)?;
            }
        }
        Ok(options)
    }

    /// Sets one option; used by the command line and by commands over TCP. `None` when the value
    /// is not understood.
    pub fn set(&mut self, key: &str, value: &str) -> Option<()> {
        match key {
            "ip" => {
                let (address, prefix) = value.split_once('/')?;
                let prefix = prefix.parse().ok().filter(|&bits| bits <= 32)?;
                self.ip = Some((parse_ipv4(address)?, prefix));
            }
            "alias" => {
                self.alias = match value {
                    "none" => None,
                    address => Some(parse_ipv4(address)?),
                };
            }
            "gw" => self.gateway = Some(parse_ipv4(value)?),
            "dirty" => self.dirty_bytes = parse_size(value)?,
            "rate" => {
                let rate = parse_size(value)?;
                self.dirty_rate_bytes = (rate > 0).then_some(rate);
            }
            "fill" => self.fill_bytes = parse_size(value)?,
            "tick_ms" => self.tick_ms = value.parse().ok()?,
            "disk" => self.disk = parse_switch(value)?,
            "disk_ms" => self.disk_ms = value.parse().ok()?,
            "disk_slots" => self.disk_slots = value.parse().ok().filter(|&slots| slots > 1)?,
            "tsc_khz" => self.tsc_khz = Some(value.parse().ok().filter(|&khz| khz > 0)?),
            "ecam" => self.ecam = Some(parse_hex(value)?),
            "button" => self.button = Some(u16::try_from(parse_hex(value)?).ok()?),
            "agent" => self.agent = parse_switch(value)?,
            "outs" => self.string_io = parse_switch(value)?,
            "hostile" => self.hostile = Some(value.parse().ok()?),
            _ => {}
        }
        Some(())
    }
}

fn parse_switch(text: &str) -> Option<bool> {
    match text {
        "0" => Some(false),
        "1" => Some(true),
        _ => None,
    }
}

/// A number with an optional suffix K, M or G (powers of 1024).
fn parse_size(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'K' => (&text[..text.len() - 1], 10),
        b'M' => (&text[..text.len() - 1], 20),
        b'G' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

fn parse_hex(text: &str) -> Option<u64> {
    u64::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}

fn parse_ipv4(text: &str) -> Option<[u8; 4]> {
    let mut octets = [0; 4];
    let mut parts = text.split('.');
    for octet in &mut octets {
        *octet = parts.next()?.parse().ok()?;
    }
    parts.next().is_none().then_some(octets)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_line_is_parsed_and_unknown_options_are_ignored() {
        let line = "console=ttyS0 quiet ip=10.77.0.5/24 gw=10.77.0.1 dirty=256M rate=64M fill=1G \
                    tick_ms=1 disk=0 agent=0 tsc_khz=2800000 ecam=0xe0000000 button=0x603 hostile=7";
        let options = Options::parse(line).unwrap();
        assert_eq!(options.ip, Some(([10, 77, 0, 5], 24)));
        assert_eq!(options.gateway, Some([10, 77, 0, 1]));
        assert_eq!(options.dirty_bytes, 256 << 20);
        assert_eq!(options.dirty_rate_bytes, Some(64 << 20));
        assert_eq!(options.fill_bytes, 1 << 30);
        assert_eq!(
            (options.tick_ms, options.disk, options.agent),
            (1, false, false)
        );
        assert_eq!(
            (options.tsc_khz, options.ecam),
            (Some(2_800_000), Some(0xe000_0000))
        );
        assert_eq!(options.hostile, Some(7));
    }

    #[test]
    fn an_alias_can_be_taken_back() {
        let mut options = Options::parse("alias=10.77.0.9").unwrap();
        assert_eq!(options.alias, Some([10, 77, 0, 9]));
        assert_eq!(options.set("alias", "some"), None);
        options.set("alias", "none").unwrap();
        assert_eq!(options.alias, None);
    }

    #[test]
    fn the_word_that_is_not_understood_is_named() {
        for bad in [
            "ip=10.77.0/24",
            "ip=10.77.0.5/33",
            "dirty=lots",
            "disk=yes",
            "ecam=12",
            "hostile=very",
        ] {
            assert_eq!(Options::parse(bad), Err(bad));
        }
    }
}

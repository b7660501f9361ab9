//! The operator's clock: the API server's wall-clock time, because plans compare it with timestamps that the
//! API server sets, such as a pod's `deletionTimestamp`. A node whose own clock is wrong or is stepped would
//! otherwise take a drain's budgets for spent, or another replica's Lease for expired.
//!
//! The API server's time is learned from the `Date` header of its responses and carried on with
//! `CLOCK_BOOTTIME`, which nobody can set. No safety rule depends on it: leases and fence proofs are judged
//! on the volumes.

use std::sync::{Mutex, PoisonError};

use bascule_operator_core::Moment;
use http::header::DATE;
use http::{HeaderMap, Response};
use jiff::Timestamp;
use rustix::time::{ClockId, clock_gettime};

/// The API server's time now; the host's wall clock until the API server has responded.
pub(crate) fn timestamp() -> Timestamp {
    CLOCK.timestamp()
}

/// [`timestamp`] as the planner's moment.
pub(crate) fn now() -> Moment {
    moment(&timestamp())
}

/// A Kubernetes timestamp as the planner's [`Moment`]; times before 1970 become 0.
pub(crate) fn moment(at: &Timestamp) -> Moment {
    Moment(u64::try_from(at.as_millisecond()).unwrap_or(0))
}

/// Takes the API server's time from one of its responses, and returns the response unchanged.
pub(crate) fn learn<B>(response: Response<B>) -> Response<B> {
    CLOCK.learn(response.headers());
    response
}

/// By how many milliseconds the API server's clock is ahead of this host's `CLOCK_BOOTTIME`, once known.
struct ApiClock(Mutex<Option<i64>>);

impl ApiClock {
    fn timestamp(&self) -> Timestamp {
        let ahead = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ahead
            .and_then(|ahead| Timestamp::from_millisecond(boot_ms() + ahead).ok())
            .unwrap_or_else(Timestamp::now)
    }

    fn learn(&self, headers: &HeaderMap) {
        let Some(date) = date(headers) else {
            return;
        };
        let boot = boot_ms();
        let mut ahead = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let first = ahead.is_none();
        let learned = corrected(*ahead, date.as_millisecond(), boot);
        *ahead = Some(learned);
        drop(ahead);
        if !first {
            return;
        }
        let difference_ms = learned + boot - Timestamp::now().as_millisecond();
        if difference_ms.unsigned_abs() > NOTABLE_MS {
            tracing::warn!(
                difference_ms,
                "this node's clock differs from the API server's; the API server's is used"
            );
        }
    }
}

fn date(headers: &HeaderMap) -> Option<Timestamp> {
    let text = headers.get(DATE)?.to_str().ok()?;
    let date = jiff::fmt::rfc2822::parse(text).ok()?;
    Some(date.timestamp())
}

/// [`ApiClock`]'s value with a response whose `Date` is `date` and that came at `boot`. A date is rounded down to whole seconds and the response
/// was under way for a while, so that an estimate within these bounds stays as it is.
fn corrected(before: Option<i64>, date: i64, boot: i64) -> i64 {
    let least = date - boot;
    let most = least + DATE_STEP_MS + LATENCY_MAX_MS;
    before.map_or(least, |before| before.clamp(least, most))
}

fn boot_ms() -> i64 {
    let now = clock_gettime(ClockId::Boottime);
    now.tv_sec * 1000 + now.tv_nsec / 1_000_000
}

static CLOCK: ApiClock = ApiClock(Mutex::new(None));
/// The resolution of the `Date` header (RFC 9110, section 5.6.7).
const DATE_STEP_MS: i64 = 1000;
/// Time from the API server's writing of a header to its receipt. A guess; a longer one moves the clock back
/// until the next response.
const LATENCY_MAX_MS: i64 = 2000;
/// A difference that is worth a warning.
const NOTABLE_MS: u64 = 5000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_api_servers_time_is_read_from_its_responses() {
        let response = Response::builder()
            .header(DATE, "Sat, 28 Nov 2026 02:43:22 GMT")
            .body(())
            .unwrap();
        let date = date(response.headers()).unwrap();
        assert_eq!(date, "2026-11-28T02:43:22Z".parse().unwrap());
        let mangled = Response::builder().header(DATE, "soon").body(()).unwrap();
        assert_eq!(super::date(mangled.headers()), None);
    }

    #[test]
    fn rounding_and_latency_do_not_move_the_clock() {
        let first = corrected(None, 50_000, 7_000);
        assert_eq!(first, 43_000);
        // 900 ms later the same second is shown.
        assert_eq!(corrected(Some(first), 50_000, 7_900), 43_000);
        // The next second is shown 100 ms later: the clock was 900 ms late.
        assert_eq!(corrected(Some(first), 51_000, 7_100), 43_900);
        // A response that took 1.5 s.
        assert_eq!(corrected(Some(43_900), 51_000, 8_600), 43_900);
    }

    #[test]
    fn a_clock_that_the_api_server_sets_back_or_forward_is_followed() {
        let hour = 3_600_000;
        assert_eq!(
            corrected(Some(43_000), 50_000 - hour, 7_000),
            43_000 - hour + 3000
        );
        assert_eq!(corrected(Some(43_000), 50_000 + hour, 7_000), 43_000 + hour);
    }

    #[test]
    fn a_wrong_clock_of_the_node_spends_no_budget_of_a_drain() {
        let clock = ApiClock(Mutex::new(None));
        let ahead = Timestamp::now() + jiff::SignedDuration::from_hours(1);
        let header = jiff::fmt::rfc2822::DateTimePrinter::new().timestamp_to_rfc9110_string(&ahead);
        let response = Response::builder()
            .header(DATE, header.unwrap())
            .body(())
            .unwrap();
        clock.learn(response.headers());
        // A pod that the API server marks as leaving now has its budgets whole.
        let spent = moment(&clock.timestamp()).0.abs_diff(moment(&ahead).0);
        assert!(spent < 1_800_000, "{spent} ms");
    }
}

//! Dates of the Gregorian calendar and days since 1970-01-01.

/// Days before 1970 in the calendar extended to 0000-01-01.
const DAYS_BEFORE_1970: i64 = 719_528;
/// Days of 400 years, after which the calendar repeats.
const DAYS_OF_400_YEARS: i64 = 146_097;

/// A date; `month` is 1 to 12, `day` 1 to 31.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Date {
    pub(super) year: i64,
    pub(super) month: u8,
    pub(super) day: u8,
}

impl Date {
    /// The date `days` after 1970-01-01.
    pub(super) fn from_days(days: i64) -> Self {
        let days = days + DAYS_BEFORE_1970;
        let cycle = days.div_euclid(DAYS_OF_400_YEARS);
        let within = days.rem_euclid(DAYS_OF_400_YEARS);
        // At most one too late, because no year is longer than 366 days.
        let mut year = within / 365;
        while days_before_year(year) > within {
            year -= 1;
        }
        let mut rest = within - days_before_year(year);
        let mut month = 1;
        while rest >= days_of_month(year, month) {
            rest -= days_of_month(year, month);
            month += 1;
        }
        Self {
            year: cycle * 400 + year,
            month,
            day: u8::try_from(rest + 1).unwrap_or(1),
        }
    }

    /// Days from 1970-01-01. A day beyond its month counts on into the next one.
    pub(super) fn to_days(self) -> i64 {
        let before = (1..self.month).map(|month| days_of_month(self.year, month));
        days_before_year(self.year) - DAYS_BEFORE_1970 + before.sum::<i64>() + i64::from(self.day)
            - 1
    }
}

/// The day of the week, 1 for Sunday, of the day `days` after 1970-01-01, a Thursday.
pub(super) fn weekday(days: i64) -> u8 {
    u8::try_from((days + 4).rem_euclid(7) + 1).unwrap_or(1)
}

/// Days from 0000-01-01 to `year`-01-01.
fn days_before_year(year: i64) -> i64 {
    let last = year - 1;
    365 * year + last.div_euclid(4) - last.div_euclid(100) + last.div_euclid(400) + 1
}

fn days_of_month(year: i64, month: u8) -> i64 {
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    match month {
        2 if leap => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn date(year: i64, month: u8, day: u8) -> Date {
        Date { year, month, day }
    }

    #[test]
    fn well_known_days_have_their_dates() {
        for (days, year, month, day, sunday_first) in [
            (0, 1970, 1, 1, 5),
            (-1, 1969, 12, 31, 4),
            (11_016, 2000, 2, 29, 3),
            (20_785, 2026, 11, 28, 7),
            (47_540, 2100, 2, 28, 1),
            (47_541, 2100, 3, 1, 2),
            (-719_528, 0, 1, 1, 7),
            (2_932_896, 9999, 12, 31, 6),
        ] {
            assert_eq!(Date::from_days(days), date(year, month, day));
            assert_eq!(date(year, month, day).to_days(), days);
            assert_eq!(weekday(days), sunday_first, "{days}");
        }
    }

    /// The slow way: day after day, month after month.
    #[test]
    fn every_day_of_a_thousand_years_follows_the_one_before() {
        let mut expected = date(1600, 1, 1);
        for days in date(1600, 1, 1).to_days()..date(2600, 1, 1).to_days() {
            assert_eq!(Date::from_days(days), expected);
            assert_eq!(expected.to_days(), days);
            expected.day += 1;
            if i64::from(expected.day) > days_of_month(expected.year, expected.month) {
                expected.day = 1;
                expected.month += 1;
            }
            if expected.month > 12 {
                expected.month = 1;
                expected.year += 1;
            }
        }
    }

    #[test]
    fn a_day_that_its_month_does_not_have_is_one_of_the_next() {
        assert_eq!(date(2026, 2, 31).to_days(), date(2026, 3, 3).to_days());
    }
}

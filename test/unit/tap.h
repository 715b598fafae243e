/*
 * tap.h
 *		Just enough of the Test Anything Protocol for the tests of pure code.
 *
 * Included once by each test program.
 */
#ifndef SENTDM_TAP_H
#define SENTDM_TAP_H

#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

static int	tap_tests = 0;
static int	tap_failures = 0;

/* One test; the name reads as a sentence. */
__attribute__((format(printf, 2, 3)))
static bool
ok(bool passed, const char *name, ...)
{
	va_list		args;

	tap_tests++;
	if (!passed)
		tap_failures++;
	printf("%sok %d - ", passed ? "" : "not ", tap_tests);
	va_start(args, name);
	vprintf(name, args);
	va_end(args);
	putchar('\n');
	return passed;
}

/* The plan at the end, and the exit status. */
static int
done_testing(void)
{
	printf("1..%d\n", tap_tests);
	printf("# %d passed, %d failed\n", tap_tests - tap_failures, tap_failures);
	return tap_failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

#endif							/* SENTDM_TAP_H */

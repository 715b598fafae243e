# sentdm: the Sent messaging API inside PostgreSQL

EXTENSION = sentdm
MODULE_big = sentdm
PGFILEDESC = "sentdm - send messages through the Sent API"

DATA = $(wildcard sql/sentdm--*.sql)
OBJS = $(patsubst %.c,%.o,$(wildcard src/*.c))

# Tests that need neither preload nor network; the rest is test/check.sh.
REGRESS = $(patsubst test/sql/%.sql,%,$(sort $(wildcard test/sql/*.sql)))
REGRESS_OPTS = --inputdir=test --load-extension=sentdm

PG_CFLAGS = -Wno-declaration-after-statement
SHLIB_LINK = -lcurl -lcrypto -lpthread
EXTRA_CLEAN = results regression.diffs regression.out build/failpoints

PG_CONFIG ?= pg_config
PGXS := $(shell $(PG_CONFIG) --pgxs)
include $(PGXS)

# Every object depends on every header: they are few, and shared memory must
# look the same to all.
$(OBJS): $(wildcard src/*.h)

# The same library for tests, with places to fail at: make failpoints
FAILPOINTS = build/failpoints
FAILPOINT_OBJS = $(patsubst src/%.c,$(FAILPOINTS)/%.o,$(shell grep -l failpoint.h src/*.c))

failpoints: $(FAILPOINTS)/sentdm.so

$(FAILPOINTS)/sentdm.so: $(FAILPOINT_OBJS) $(filter-out $(FAILPOINT_OBJS:$(FAILPOINTS)/%=src/%),$(OBJS))
	$(CC) $(CFLAGS) $^ $(LDFLAGS) $(LDFLAGS_SL) -shared -o $@ $(SHLIB_LINK)

$(FAILPOINT_OBJS): $(FAILPOINTS)/%.o: src/%.c $(wildcard src/*.h)
	@mkdir -p $(FAILPOINTS)
	$(CC) $(CFLAGS) $(CPPFLAGS) -DSENTDM_FAILPOINTS -c -o $@ $<

.PHONY: failpoints

# The receiver of webhooks, a program of its own: make receiver
include src/receiver/receiver.mk

# What it costs and how fast it is; a server of its own: docs/performance.md
.PHONY: bench
bench:
	bash test/bench/run.sh $(BENCH)

# From a database that has the extension, found by PGHOST, PGDATABASE and so on.
.PHONY: reference
reference:
	psql -X -A -t -q -v ON_ERROR_STOP=1 -f test/reference.sql -o docs/reference.md

# sentdm-receiver: make receiver, make install-receiver

RECEIVER_SRCS = $(sort $(wildcard src/receiver/*.c))
RECEIVER_OBJS = $(patsubst src/receiver/%.c,build/receiver/%.o,$(RECEIVER_SRCS))
RECEIVER_VERSION = $(shell sed -n "s/^default_version *= *'\(.*\)'/\1/p" sentdm.control)
RECEIVER_CFLAGS ?= -O2 -g
RECEIVER_CPPFLAGS = -D_GNU_SOURCE -DSENTDM_VERSION='"$(RECEIVER_VERSION)"' \
	-I$(shell $(PG_CONFIG) --includedir)
RECEIVER_WARNINGS = -std=gnu11 -Wall -Wextra -Wshadow -Wstrict-prototypes -Wmissing-prototypes
RECEIVER_LIBS = -L$(shell $(PG_CONFIG) --libdir) -lmicrohttpd -lpq -pthread

RECEIVER_PREFIX ?= /usr/local
RECEIVER_BINDIR ?= $(RECEIVER_PREFIX)/bin
RECEIVER_MANDIR ?= $(RECEIVER_PREFIX)/share/man
RECEIVER_UNITDIR ?= $(RECEIVER_PREFIX)/lib/systemd/system

.PHONY: receiver install-receiver clean-receiver

receiver: build/sentdm-receiver

build/sentdm-receiver: $(RECEIVER_OBJS)
	$(CC) $(RECEIVER_CFLAGS) $(RECEIVER_LDFLAGS) -o $@ $(RECEIVER_OBJS) $(RECEIVER_LIBS)

build/receiver/%.o: src/receiver/%.c $(wildcard src/receiver/*.h) sentdm.control
	@mkdir -p $(@D)
	$(CC) $(RECEIVER_WARNINGS) $(RECEIVER_CFLAGS) $(RECEIVER_CPPFLAGS) -pthread -c -o $@ $<

install-receiver: receiver
	install -d '$(DESTDIR)$(RECEIVER_BINDIR)' '$(DESTDIR)$(RECEIVER_MANDIR)/man8' '$(DESTDIR)$(RECEIVER_UNITDIR)'
	install -m 755 build/sentdm-receiver '$(DESTDIR)$(RECEIVER_BINDIR)/'
	install -m 644 docs/man/sentdm-receiver.8 '$(DESTDIR)$(RECEIVER_MANDIR)/man8/'
	sed 's|/usr/bin/sentdm-receiver|$(RECEIVER_BINDIR)/sentdm-receiver|' packaging/sentdm-receiver.service \
		> '$(DESTDIR)$(RECEIVER_UNITDIR)/sentdm-receiver.service'

clean-receiver:
	rm -rf build/receiver build/sentdm-receiver

clean: clean-receiver

/*
 * address.h
 *		IP addresses and networks.
 */
#ifndef RECEIVER_ADDRESS_H
#define RECEIVER_ADDRESS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>

#define RECEIVER_ADDRESS_TEXT 48	/* bytes that an address needs as text */

/* IPv6; an IPv4 address is kept as the IPv6 address that it is mapped to. */
typedef struct ReceiverAddress
{
	uint8_t		bytes[16];
} ReceiverAddress;

typedef struct ReceiverNetwork
{
	ReceiverAddress address;
	int			prefix;			/* bits */
} ReceiverNetwork;

extern void receiver_address_from_socket(ReceiverAddress *address, const struct sockaddr *from);
extern bool receiver_address_parse(ReceiverAddress *address, const char *text, size_t length);
extern void receiver_address_format(const ReceiverAddress *address, char *text);

/* What one customer of a provider has: an IPv4 address, or 2^64 of IPv6. */
extern ReceiverAddress receiver_address_group(const ReceiverAddress *address);

/* "192.0.2.0/24", "2001:db8::1" */
extern bool receiver_network_parse(ReceiverNetwork *network, const char *text, size_t length);
extern bool receiver_network_contains(const ReceiverNetwork *networks, int n,
									  const ReceiverAddress *address);

/*
 * Who sent a request that came from a trusted proxy: the last address of
 * X-Forwarded-For that is not a trusted proxy itself.  What is left of it is
 * anybody's word.
 */
extern void receiver_address_forwarded(ReceiverAddress *address, const char *forwarded_for,
									   const ReceiverNetwork *trusted, int n);

#endif							/* RECEIVER_ADDRESS_H */

/*
 * address.c
 *		IP addresses and networks.
 */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "address.h"

static const uint8_t mapped[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};

static bool
is_ipv4(const ReceiverAddress *address)
{
	return memcmp(address->bytes, mapped, sizeof(mapped)) == 0;
}

static void
set_ipv4(ReceiverAddress *address, const void *ipv4)
{
	memcpy(address->bytes, mapped, sizeof(mapped));
	memcpy(address->bytes + 12, ipv4, 4);
}

void
receiver_address_from_socket(ReceiverAddress *address, const struct sockaddr *from)
{
	memset(address, 0, sizeof(*address));
	if (from->sa_family == AF_INET)
		set_ipv4(address, &((const struct sockaddr_in *) from)->sin_addr);
	else if (from->sa_family == AF_INET6)
		memcpy(address->bytes, &((const struct sockaddr_in6 *) from)->sin6_addr, 16);
}

bool
receiver_address_parse(ReceiverAddress *address, const char *text, size_t length)
{
	char		copy[RECEIVER_ADDRESS_TEXT];
	uint8_t		ipv4[4];

	if (length >= sizeof(copy))
		return false;
	memcpy(copy, text, length);
	copy[length] = '\0';
	if (inet_pton(AF_INET, copy, ipv4) == 1)
	{
		set_ipv4(address, ipv4);
		return true;
	}
	return inet_pton(AF_INET6, copy, address->bytes) == 1;
}

void
receiver_address_format(const ReceiverAddress *address, char *text)
{
	if (is_ipv4(address))
		inet_ntop(AF_INET, address->bytes + 12, text, RECEIVER_ADDRESS_TEXT);
	else
		inet_ntop(AF_INET6, address->bytes, text, RECEIVER_ADDRESS_TEXT);
}

ReceiverAddress
receiver_address_group(const ReceiverAddress *address)
{
	ReceiverAddress group = *address;

	if (!is_ipv4(address))
		memset(group.bytes + 8, 0, 8);
	return group;
}

bool
receiver_network_parse(ReceiverNetwork *network, const char *text, size_t length)
{
	const char *slash = memchr(text, '/', length);
	size_t		address_length = slash ? (size_t) (slash - text) : length;
	int			bits;

	if (!receiver_address_parse(&network->address, text, address_length))
		return false;
	bits = is_ipv4(&network->address) && memchr(text, ':', address_length) == NULL ? 32 : 128;
	network->prefix = 128;
	if (slash != NULL)
	{
		int			prefix = 0;

		if (slash + 1 == text + length)
			return false;
		for (const char *p = slash + 1; p < text + length; p++)
		{
			if (*p < '0' || *p > '9' || prefix > bits)
				return false;
			prefix = prefix * 10 + (*p - '0');
		}
		if (prefix > bits)
			return false;
		network->prefix = 128 - bits + prefix;
	}
	return true;
}

static bool
contains(const ReceiverNetwork *network, const ReceiverAddress *address)
{
	int			bytes = network->prefix / 8;
	int			bits = network->prefix % 8;

	if (memcmp(network->address.bytes, address->bytes, bytes) != 0)
		return false;
	return bits == 0 ||
		(network->address.bytes[bytes] ^ address->bytes[bytes]) >> (8 - bits) == 0;
}

bool
receiver_network_contains(const ReceiverNetwork *networks, int n, const ReceiverAddress *address)
{
	for (int i = 0; i < n; i++)
	{
		if (contains(&networks[i], address))
			return true;
	}
	return false;
}

void
receiver_address_forwarded(ReceiverAddress *address, const char *forwarded_for,
						   const ReceiverNetwork *trusted, int n)
{
	const char *end = forwarded_for + strlen(forwarded_for);

	while (end > forwarded_for && receiver_network_contains(trusted, n, address))
	{
		const char *start;
		const char *entry_end = end;

		while (entry_end > forwarded_for && (entry_end[-1] == ' ' || entry_end[-1] == '\t'))
			entry_end--;
		start = entry_end;
		while (start > forwarded_for && start[-1] != ',')
			start--;
		end = start > forwarded_for ? start - 1 : start;
		while (start < entry_end && (*start == ' ' || *start == '\t'))
			start++;
		if (!receiver_address_parse(address, start, (size_t) (entry_end - start)))
			return;
	}
}

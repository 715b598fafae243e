/*
 * guard.c
 *		What only the database knows against a message: an unknown template, a
 *		recipient who does not want it.
 *
 * Runs in the caller's transaction before anything is written, and must cost
 * nothing where it is not wanted: templates are looked up only when
 * sentdm.check_templates is on, opt-outs only when sentdm.optouts has a page.
 * Statements run under the caller's search_path, so they contain no operator and
 * no unqualified name.
 */
#include "postgres.h"

#include "access/table.h"
#include "access/xact.h"
#include "catalog/namespace.h"
#include "catalog/pg_type.h"
#include "storage/bufmgr.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"

#include "guard.h"
#include "sentdm.h"
#include "sql.h"

/* Nobody ever opted out: the relation has no page yet. */
static bool
has_page(void)
{
	Oid			relid = get_relname_relid("optouts", get_namespace_oid("sentdm", false));
	Relation	optouts = table_open(relid, AccessShareLock);
	bool		any = RelationGetNumberOfBlocks(optouts) > 0;

	table_close(optouts, AccessShareLock);
	return any;
}

/* What a transaction sees: what was committed, and what it did itself. */
typedef struct Sight
{
	TransactionId xmin;
	TransactionId xmax;
	uint32		in_progress;
	CommandId	command;
} Sight;

/*
 * To look costs as much as the rest of the guard, so it is done once for what can
 * be seen: who opts out while a statement runs is not seen by that statement.
 */
static bool
anybody_opted_out(void)
{
	static Sight nobody;
	Snapshot	snapshot = GetActiveSnapshot();
	Sight		now = {snapshot->xmin, snapshot->xmax, snapshot->xcnt, GetCurrentCommandId(false)};

	if (memcmp(&now, &nobody, sizeof(now)) == 0)
		return false;
	if (has_page())
		return true;
	nobody = now;
	return false;
}

/* A sender profile has templates of its own, which nobody synced. */
static bool
must_check_template(const SentdmDraft *draft)
{
	return sentdm_check_templates && draft->template_name != NULL &&
		draft->template_name[0] != '\0' && draft->profile_id == NULL;
}

static bool
must_check_recipients(const SentdmDraft *draft)
{
	return sentdm_on_opt_out != SENTDM_OPT_OUT_SEND && draft->n_recipients > 0 && anybody_opted_out();
}

bool
sentdm_guard_is_needed(const SentdmDraft *draft)
{
	return must_check_template(draft) || must_check_recipients(draft);
}

/* The message outlives the SPI connection. */
static bool
complain(SentdmComplaint *complaint, int sqlstate, const char *message, const char *hint)
{
	complaint->sqlstate = sqlstate;
	complaint->message = SPI_palloc(strlen(message) + 1);
	strcpy(complaint->message, message);
	complaint->hint = hint;
	return false;
}

static bool
complain_of_template(SentdmComplaint *complaint)
{
	static SentdmStatement any = {.sql = "SELECT FROM sentdm.templates LIMIT 1"};

	if (sentdm_execute(&any, NULL, NULL) == 0)
		return complain(complaint, ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
						"the template cannot be checked, because sentdm.templates is empty",
						"Run SELECT sentdm_sync_templates(), or turn sentdm.check_templates off.");
	return complain(complaint, ERRCODE_INVALID_PARAMETER_VALUE,
					"argument \"template\" names a template that the account does not have",
					"See sentdm.templates; if it is new, run SELECT sentdm_sync_templates().");
}

/*
 * Templates may share a name, in several languages say: one whose variables are
 * all given is enough.
 */
static bool
check_template(const SentdmDraft *draft, SentdmComplaint *complaint)
{
	static SentdmStatement find = {
		.sql = "SELECT (SELECT u.variable FROM pg_catalog.unnest(t.variables) WITH ORDINALITY AS u(variable, n)"
		"  WHERE NOT coalesce($2 OPERATOR(pg_catalog.?) u.variable, false) ORDER BY u.n LIMIT 1) AS missing"
		" FROM sentdm.templates t WHERE t.name OPERATOR(pg_catalog.=) $1"
		"  OR t.id OPERATOR(pg_catalog.=) pg_catalog.lower($1) ORDER BY missing NULLS FIRST LIMIT 1",
		.nargs = 2,
		.types = {TEXTOID, JSONBOID}
	};
	Datum		values[2];
	char	   *missing;

	values[0] = CStringGetTextDatum(draft->template_name);
	values[1] = JsonbPGetDatum(draft->parameters);
	if (sentdm_execute(&find, values, draft->parameters ? NULL : " n") == 0)
		return complain_of_template(complaint);
	missing = SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1);
	if (missing == NULL)
		return true;
	return complain(complaint, ERRCODE_INVALID_PARAMETER_VALUE,
					psprintf("argument \"parameters\" lacks \"%s\", a variable of the template", missing),
					"Give every variable of the template a value; sentdm.templates lists them.");
}

static int
compare_numbers(const void *a, const void *b)
{
	return strcmp(*(char *const *) a, *(char *const *) b);
}

/* Those of the recipients who opted out, sorted; returns how many. */
static int
find_opted_out(const SentdmDraft *draft, char ***numbers)
{
	static SentdmStatement find = {
		.sql = "SELECT phone FROM sentdm.optouts WHERE phone OPERATOR(pg_catalog.=) ANY ($1) AND opted_out",
		.nargs = 1,
		.types = {TEXTARRAYOID}
	};
	Datum	   *recipients = palloc(draft->n_recipients * sizeof(Datum));
	Datum		values[1];
	int			n;

	for (int i = 0; i < draft->n_recipients; i++)
		recipients[i] = CStringGetTextDatum(draft->recipients[i]);
	values[0] = sentdm_array(recipients, NULL, draft->n_recipients, TEXTOID);
	n = (int) sentdm_execute(&find, values, NULL);
	*numbers = palloc((n + 1) * sizeof(char *));
	for (int i = 0; i < n; i++)
		(*numbers)[i] = SPI_getvalue(SPI_tuptable->vals[i], SPI_tuptable->tupdesc, 1);
	qsort(*numbers, n, sizeof(char *), compare_numbers);
	return n;
}

static bool
check_recipients(SentdmDraft *draft, SentdmComplaint *complaint)
{
	char	  **numbers;
	int			n = find_opted_out(draft, &numbers);
	int			kept = 0;

	if (n > 0 && sentdm_on_opt_out == SENTDM_OPT_OUT_REFUSE)
		return complain(complaint, ERRCODE_INVALID_PARAMETER_VALUE,
						draft->plural ? "argument \"recipients\" contains a number that has opted out"
						: "the recipient has opted out",
						"Leave out the numbers in sentdm.optouts, or set sentdm.on_opt_out to \"skip\".");
	for (int i = 0; n > 0 && i < draft->n_recipients; i++)
	{
		if (bsearch(&draft->recipients[i], numbers, n, sizeof(char *), compare_numbers) == NULL)
			draft->recipients[kept++] = draft->recipients[i];
		else
			draft->opted_out++;
	}
	draft->n_recipients -= draft->opted_out;
	return true;
}

bool
sentdm_guard(SentdmDraft *draft, SentdmComplaint *complaint)
{
	bool		good;

	SPI_connect();
	good = (!must_check_template(draft) || check_template(draft, complaint)) &&
		(!must_check_recipients(draft) || check_recipients(draft, complaint));
	SPI_finish();
	return good;
}

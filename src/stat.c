/*
 * stat.c
 *		What the worker of this database says of itself, for views and health.
 *
 * No personal data passes here.
 */
#include "postgres.h"

#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "credentials.h"
#include "http.h"
#include "sentdm.h"
#include "shmem.h"

PG_FUNCTION_INFO_V1(sentdm_worker_report);
PG_FUNCTION_INFO_V1(sentdm_counters);
PG_FUNCTION_INFO_V1(sentdm_credentials_trouble);
PG_FUNCTION_INFO_V1(sentdm_webhook_secret_set);

#define REPORT_COLUMNS 12

/* One row for the current database. */
Datum
sentdm_worker_report(PG_FUNCTION_ARGS)
{
	SentdmSlot *slot = sentdm_slot(MyDatabaseId, false);
	SentdmWorkerReport report;
	TupleDesc	desc;
	Datum		values[REPORT_COLUMNS];
	bool		nulls[REPORT_COLUMNS];

	if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");
	memset(&report, 0, sizeof(report));
	report.mode = -1;
	if (slot != NULL)
		sentdm_slot_read_report(slot, &report);

	values[0] = BoolGetDatum(sentdm_shmem_available());
	values[1] = BoolGetDatum(sentdm_launcher_running());
	values[2] = BoolGetDatum(slot != NULL && slot->enabled);
	values[3] = Int32GetDatum(report.pid);
	values[4] = TimestampTzGetDatum(report.started_at);
	values[5] = Int32GetDatum(report.in_flight);
	values[6] = TimestampTzGetDatum(report.answered_at);
	values[7] = Int32GetDatum(report.http_status);
	values[8] = CStringGetTextDatum(report.error_code);
	values[9] = Int64GetDatum(report.clock_skew_ms);
	values[10] = CStringGetTextDatum(report.trouble);
	values[11] = CStringGetTextDatum(sentdm_mode_name(report.mode));
	memset(nulls, 0, sizeof(nulls));
	nulls[3] = report.pid == 0;
	nulls[4] = report.started_at == 0;
	nulls[6] = nulls[7] = report.answered_at == 0;
	nulls[8] = report.error_code[0] == '\0';
	nulls[9] = !report.clock_known;
	nulls[10] = report.trouble[0] == '\0';
	nulls[11] = report.mode < 0;
	PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(BlessTupleDesc(desc), values, nulls)));
}

/* name and value of each counter of the current database */
Datum
sentdm_counters(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
	SentdmSlot *slot = sentdm_slot(MyDatabaseId, false);

	InitMaterializedSRF(fcinfo, 0);
	for (int i = 0; i < SENTDM_COUNTERS; i++)
	{
		Datum		values[2];
		bool		nulls[2] = {false, false};

		values[0] = CStringGetTextDatum(sentdm_counter_names[i]);
		values[1] = Int64GetDatum(slot ? (int64) pg_atomic_read_u64(&slot->counters[i]) : 0);
		tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
	}
	return (Datum) 0;
}

/* What keeps the API from being called with these settings; NULL: nothing. */
Datum
sentdm_credentials_trouble(PG_FUNCTION_ARGS)
{
	char		key[SENTDM_MAX_KEY];
	const char *trouble = sentdm_read_api_key(key);

	explicit_bzero(key, sizeof(key));
	if (trouble == NULL)
		trouble = sentdm_http_check_url(sentdm_base_url, sentdm_allow_insecure_http);
	if (trouble == NULL && sentdm_api_key_setting()[0] != '\0' && sentdm_api_key_file[0] != '\0')
		trouble = "both sentdm.api_key and sentdm.api_key_file are set; the first one is used";
	if (trouble == NULL && getenv("SENT_DM_API_KEY") != NULL &&
		(sentdm_api_key_setting()[0] != '\0' || sentdm_api_key_file[0] != '\0'))
		trouble = "an API key is set here and as SENT_DM_API_KEY in the environment; that one is not used";
	if (trouble == NULL)
		PG_RETURN_NULL();
	PG_RETURN_TEXT_P(cstring_to_text(trouble));
}

Datum
sentdm_webhook_secret_set(PG_FUNCTION_ARGS)
{
	PG_RETURN_BOOL(sentdm_webhook_secret_setting()[0] != '\0');
}
